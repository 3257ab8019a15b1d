//! The Python module `rustbpe`: a thin binding around `bpe.rs` (training) and `encode.rs`.
//!
//! The GIL is held only while strings are taken from the caller's iterator and results are handed over. Long loops look
//! for Ctrl+C, and print every two seconds how far they are.

mod bpe;
mod encode;
mod split;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyBytes;

use split::Splitter;

/// Text counted at a time: enough for all cores to have work, little enough to hold in memory and to be interrupted.
const BATCH_BYTES: usize = 16 << 20;

/// A vocabulary and its split: learnt from text, or made from the tokens of an earlier one.
#[pyclass]
struct Tokenizer {
    pattern: String,
    tokens: Vec<Vec<u8>>, // by rank
    encoder: Option<encode::Encoder>,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Tokenizer { pattern: split::WORDS.to_string(), tokens: vec![], encoder: None }
    }

    /// tokens: by rank, the 256 bytes among them. ValueError for a missing byte, a token that is there twice, and a
    /// pattern that is not valid.
    #[staticmethod]
    fn from_tokens(tokens: Vec<Vec<u8>>, pattern: String) -> PyResult<Self> {
        let mut tokenizer = Tokenizer { pattern, tokens, encoder: None };
        tokenizer.prepare()?;
        Ok(tokenizer)
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
            return Err(PyValueError::new_err(format!(
                "vocab_size is {vocab_size}, the bytes alone are 256"
            )));
        }
        let pattern = pattern.unwrap_or_else(|| split::WORDS.to_string());
        let counts = count(py, iterator, &splitter(&pattern)?)?;
        let mut tokens = bpe::byte_order().into_iter().map(|b| vec![b]).collect();
        py.detach(|| {
            let pieces = bpe::Pieces::of_bytes(&counts);
            drop(counts);
            bpe::train(pieces, &mut tokens, vocab_size, |_| true, &mut ticker())
        })?;
        (self.pattern, self.tokens) = (pattern, tokens);
        self.prepare()
    }

    /// SuperBPE's second stage: goes on from this vocabulary to `vocab_size`, with tokens of several words.
    fn train_superwords(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
    ) -> PyResult<()> {
        let mut tokens = self.tokens.clone();
        let counts = count(py, iterator, &splitter(split::SUPERWORDS)?)?;
        let encoder = self.encoder()?;
        py.detach(|| {
            let pieces = bpe::Pieces::of_tokens(&counts, encoder);
            drop(counts);
            bpe::train(pieces, &mut tokens, vocab_size, bpe::superword, &mut ticker())
        })?;
        (self.pattern, self.tokens) = (split::SUPERWORDS.to_string(), tokens);
        self.prepare()
    }

    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// List of (token's bytes, rank), by rank.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.tokens.iter().zip(0..).map(|(token, rank)| (PyBytes::new(py, token), rank)).collect()
    }

    /// Ids of a text.
    fn encode(&self, py: Python<'_>, text: PyBackedStr) -> PyResult<Vec<u32>> {
        let (encoder, mut ids) = (self.encoder()?, vec![]);
        py.detach(|| encoder.encode(&text, &mut ids)).map_err(PyValueError::new_err)?;
        Ok(ids)
    }

    /// The ids of many texts, one after another as 32-bit numbers in native order, and how many each text has.
    /// `prepend` is put before each.
    #[pyo3(signature = (texts, threads, prepend=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        threads: usize,
        prepend: Option<u32>,
    ) -> PyResult<(Bound<'py, PyBytes>, Vec<usize>)> {
        let encoder = self.encoder()?;
        let rows = py
            .detach(|| encode_rows(encoder, &texts, threads, prepend))
            .map_err(PyValueError::new_err)?;
        let total: usize = rows.iter().map(Vec::len).sum();
        let ids = PyBytes::new_with(py, 4 * total, |buffer| {
            for (bytes, id) in buffer.chunks_exact_mut(4).zip(rows.iter().flatten()) {
                bytes.copy_from_slice(&id.to_ne_bytes());
            }
            Ok(())
        })?;
        Ok((ids, rows.iter().map(Vec::len).collect()))
    }

    /// The pieces of a text. by_hand=False asks the regex engine, also where there is a scanner.
    #[staticmethod]
    #[pyo3(signature = (text, pattern, by_hand=true))]
    fn split(text: &str, pattern: &str, by_hand: bool) -> PyResult<Vec<String>> {
        let splitter = if by_hand { Splitter::new(pattern) } else { Splitter::by_regex(pattern) };
        let mut pieces = vec![];
        let done =
            splitter.and_then(|s| s.for_each(text, |piece| pieces.push(text[piece].to_string())));
        done.map(|()| pieces).map_err(PyValueError::new_err)
    }
}

impl Tokenizer {
    fn prepare(&mut self) -> PyResult<()> {
        let encoder = encode::Encoder::new(&self.tokens, splitter(&self.pattern)?);
        self.encoder = Some(encoder.map_err(PyValueError::new_err)?);
        Ok(())
    }

    fn encoder(&self) -> PyResult<&encode::Encoder> {
        let untrained = || {
            PyValueError::new_err(
                "the tokenizer has not been trained: call train_from_iterator first",
            )
        };
        self.encoder.as_ref().ok_or_else(untrained)
    }
}

fn splitter(pattern: &str) -> PyResult<Splitter> {
    Splitter::new(pattern).map_err(PyValueError::new_err)
}

/// Looks for Ctrl+C now and then, and says how many merges are done.
fn ticker() -> impl FnMut(usize, usize) -> PyResult<()> {
    let (mut progress, mut looked) = (Progress::new(), Instant::now());
    move |done, of| {
        if looked.elapsed() > Duration::from_millis(50) {
            looked = Instant::now();
            Python::attach(|py| py.check_signals())?;
            progress.say(|| format!("{done} of {of} merges"));
        }
        Ok(())
    }
}

/// How often each piece occurs in an iterable of strings.
fn count(py: Python<'_>, texts: &Bound<'_, PyAny>, splitter: &Splitter) -> PyResult<bpe::Counts> {
    let mut counts = bpe::Counts::default();
    let mut texts = texts.try_iter()?;
    let (mut batch, mut bytes, mut total): (Vec<PyBackedStr>, usize, usize) = (vec![], 0, 0);
    let mut progress = Progress::new();
    loop {
        let text = texts
            .next()
            .map(|text| text?.extract::<PyBackedStr>().map_err(PyErr::from))
            .transpose()?;
        let last = text.is_none();
        if let Some(text) = text {
            bytes += text.len();
            batch.push(text);
        }
        if last || bytes >= BATCH_BYTES {
            py.detach(|| bpe::count_pieces(&batch, splitter, &mut counts))
                .map_err(PyValueError::new_err)?;
            py.check_signals()?;
            total += bytes;
            progress
                .say(|| format!("{} MB counted, {} different pieces", total >> 20, counts.len()));
            batch.clear();
            bytes = 0;
        }
        if last {
            return Ok(counts);
        }
    }
}

/// The ids of each text, `prepend` before them. Threads take the next text that no other has taken.
fn encode_rows(
    encoder: &encode::Encoder,
    texts: &[PyBackedStr],
    threads: usize,
    prepend: Option<u32>,
) -> Result<Vec<Vec<u32>>, String> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut mine = vec![];
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(text) = texts.get(i) else { return Ok::<_, String>(mine) };
            let mut ids: Vec<u32> = prepend.into_iter().collect();
            encoder.encode(text, &mut ids)?;
            mine.push((i, ids));
        }
    };
    let parts: Vec<_> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(texts.len())).map(|_| scope.spawn(work)).collect();
        let mine = work();
        others
            .into_iter()
            .map(|thread| thread.join().expect("encoding does not panic"))
            .chain([mine])
            .collect()
    });
    let mut rows = vec![vec![]; texts.len()];
    for part in parts {
        for (i, ids) in part? {
            rows[i] = ids;
        }
    }
    Ok(rows)
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
