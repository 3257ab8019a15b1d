//! The Python module `rustbpe`: a thin binding around `bpe.rs`.
//!
//! No Python object outlives the statement that made it, and the GIL is held only while strings are copied out of the
//! caller's iterator. Long loops look for Ctrl+C, and print every two seconds how far they are.

mod bpe;

use std::time::{Duration, Instant};

use fancy_regex::Regex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Text counted at a time: enough for all cores to have work, little enough to hold in memory and to be interrupted.
const BATCH_BYTES: usize = 16 << 20;

/// GPT-4's split, but numbers in runs of one or two digits instead of three: with a small vocabulary, a thousand
/// tokens for three-digit numbers are better spent on words. The alternatives cover every character (letter, number,
/// white space, none of these), and have to: tiktoken drops what the pattern does not match.
/// This is its only copy: Python asks for it with `get_pattern` and stores it beside the ranks.
const PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

#[pyclass]
struct Tokenizer {
    pattern: String,
    tokens: Vec<Vec<u8>>, // by rank
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Tokenizer { pattern: PATTERN.to_string(), tokens: vec![] }
    }

    /// Learns a vocabulary of `vocab_size` tokens, the 256 bytes among them, from an iterable of strings.
    /// Ends with fewer when every piece of the text has become one token.
    #[pyo3(signature = (iterator, vocab_size, pattern=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        pattern: Option<String>,
    ) -> PyResult<()> {
        if vocab_size < 256 {
            return Err(PyValueError::new_err(format!("vocab_size is {vocab_size}, the bytes alone are 256")));
        }
        let pattern = pattern.unwrap_or_else(|| PATTERN.to_string());
        let regex = compile(&pattern)?;
        let mut counts = bpe::Counts::default();
        let mut texts = iterator.try_iter()?;
        let (mut batch, mut bytes, mut total) = (vec![], 0, 0);
        let mut progress = Progress::new();
        loop {
            let text: Option<String> = texts.next().map(|text| text?.extract()).transpose()?;
            let last = text.is_none();
            if let Some(text) = text {
                bytes += text.len();
                batch.push(text);
            }
            if last || bytes >= BATCH_BYTES {
                py.detach(|| bpe::count_pieces(&batch, &regex, &mut counts)).map_err(PyValueError::new_err)?;
                py.check_signals()?;
                total += bytes;
                progress.say(|| format!("{} MB counted, {} different pieces", total >> 20, counts.len()));
                batch.clear();
                bytes = 0;
            }
            if last {
                break;
            }
        }
        self.tokens = py.detach(|| {
            let mut progress = Progress::new();
            let mut looked = Instant::now();
            let mut tick = |done: usize, of: usize| {
                if looked.elapsed() > Duration::from_millis(50) {
                    looked = Instant::now();
                    Python::attach(|py| py.check_signals())?;
                    progress.say(|| format!("{done} of {of} merges"));
                }
                Ok::<(), PyErr>(())
            };
            bpe::train(&counts, vocab_size, &mut tick)
        })?;
        self.pattern = pattern;
        Ok(())
    }

    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// List of (token's bytes, rank), by rank.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.tokens.iter().zip(0..).map(|(token, rank)| (PyBytes::new(py, token), rank)).collect()
    }

    /// Ids of a text, by the slow and obvious way.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        if self.tokens.is_empty() {
            return Err(PyValueError::new_err("the tokenizer has not been trained: call train_from_iterator first"));
        }
        let regex = compile(&self.pattern)?;
        let ranks = self.tokens.iter().cloned().zip(0..).collect();
        py.detach(|| bpe::encode(text, &regex, &ranks)).map_err(PyValueError::new_err)
    }
}

fn compile(pattern: &str) -> PyResult<Regex> {
    Regex::new(pattern).map_err(|e| PyValueError::new_err(format!("the split pattern is not valid: {e}")))
}

/// Lets one line through every two seconds.
struct Progress(Instant);

impl Progress {
    fn new() -> Self {
        Progress(Instant::now())
    }

    fn say(&mut self, line: impl Fn() -> String) {
        if self.0.elapsed() > Duration::from_secs(2) {
            println!("rustbpe: {}", line());
            self.0 = Instant::now();
        }
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
