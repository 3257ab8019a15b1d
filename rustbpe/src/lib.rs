//! The Python module `rustbpe`: a thin binding around `bpe.rs` (training) and `encode.rs`.
//!
//! The GIL is held only while strings are taken from the caller's iterator and results are handed
//! over. Long loops check for Ctrl+C, and print their progress every two seconds.

mod bpe;
mod encode;
mod split;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyBytes;

use split::Splitter;

/// Text counted at a time: enough for all cores to have work, little enough to hold in memory and
/// to be interrupted.
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

    /// tokens: by rank, the 256 bytes among them. ValueError for a missing byte, for two tokens
    /// that are the same, and for a pattern that is not valid.
    #[staticmethod]
    fn from_tokens(tokens: Vec<Vec<u8>>, pattern: String) -> PyResult<Self> {
        let mut tokenizer = Tokenizer { pattern, tokens, encoder: None };
        tokenizer.prepare()?;
        Ok(tokenizer)
    }

    /// Learns a vocabulary of `vocab_size` tokens, the 256 bytes among them, from an iterable of
    /// strings. The vocabulary stays smaller when every piece of the text has become one token.
    #[pyo3(signature = (iterator, vocab_size, pattern=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        pattern: Option<String>,
    ) -> PyResult<()> {
        if vocab_size < 256 {
            let message = format!("vocab_size is {vocab_size}, the bytes alone are 256");
            return Err(PyValueError::new_err(message));
        }
        let pattern = pattern.unwrap_or_else(|| split::WORDS.to_string());
        let counts = count_pieces(py, iterator, &splitter(&pattern)?)?;
        let mut tokens = bpe::byte_order().into_iter().map(|b| vec![b]).collect();
        py.detach(|| {
            let pieces = bpe::Pieces::of_bytes(&counts);
            drop(counts);
            bpe::train(pieces, &mut tokens, vocab_size, |_| true, &mut merge_progress())
        })?;
        (self.pattern, self.tokens) = (pattern, tokens);
        self.prepare()
    }

    /// SuperBPE's second stage: extends this vocabulary to `vocab_size`, with tokens of several
    /// words.
    fn train_superwords(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
    ) -> PyResult<()> {
        let mut tokens = self.tokens.clone();
        let counts = count_pieces(py, iterator, &splitter(split::SUPERWORDS)?)?;
        let encoder = self.encoder()?;
        py.detach(|| {
            let pieces = bpe::Pieces::of_tokens(&counts, encoder);
            drop(counts);
            bpe::train(pieces, &mut tokens, vocab_size, bpe::is_superword, &mut merge_progress())
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

    /// The ids of many texts, one after another as 32-bit numbers in native order, and the number
    /// of ids of each text. `prepend` is put before each text.
    #[pyo3(signature = (texts, threads, prepend=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        threads: usize,
        prepend: Option<u32>,
    ) -> PyResult<(Bound<'py, PyBytes>, Vec<usize>)> {
        let encoder = self.encoder()?;
        let encoded = py
            .detach(|| encode_texts(encoder, &texts, threads, prepend))
            .map_err(PyValueError::new_err)?;
        let lengths: Vec<usize> = encoded.iter().map(Vec::len).collect();
        let total: usize = lengths.iter().sum();
        let ids = PyBytes::new_with(py, 4 * total, |buffer| {
            for (bytes, id) in buffer.chunks_exact_mut(4).zip(encoded.iter().flatten()) {
                bytes.copy_from_slice(&id.to_ne_bytes());
            }
            Ok(())
        })?;
        Ok((ids, lengths))
    }

    /// The pieces of a text. by_hand=False asks the regex engine, also where there is a scanner.
    #[staticmethod]
    #[pyo3(signature = (text, pattern, by_hand=true))]
    fn split(text: &str, pattern: &str, by_hand: bool) -> PyResult<Vec<String>> {
        let splitter = if by_hand { Splitter::new(pattern) } else { Splitter::by_regex(pattern) };
        let mut pieces = vec![];
        let add = |range: Range<usize>| pieces.push(text[range].to_string());
        splitter
            .and_then(|splitter| splitter.for_each(text, add))
            .map_err(PyValueError::new_err)?;
        Ok(pieces)
    }
}

impl Tokenizer {
    fn prepare(&mut self) -> PyResult<()> {
        let encoder = encode::Encoder::new(&self.tokens, splitter(&self.pattern)?);
        self.encoder = Some(encoder.map_err(PyValueError::new_err)?);
        Ok(())
    }

    fn encoder(&self) -> PyResult<&encode::Encoder> {
        let message = "the tokenizer has not been trained: call train_from_iterator first";
        self.encoder.as_ref().ok_or_else(|| PyValueError::new_err(message))
    }
}

fn splitter(pattern: &str) -> PyResult<Splitter> {
    Splitter::new(pattern).map_err(PyValueError::new_err)
}

/// A callback for training: checks for Ctrl+C now and then, and prints how many merges are done.
fn merge_progress() -> impl FnMut(usize, usize) -> PyResult<()> {
    let mut progress = Progress::new();
    let mut checked = Instant::now();
    move |done, total| {
        if checked.elapsed() > Duration::from_millis(50) {
            checked = Instant::now();
            Python::attach(|py| py.check_signals())?;
            progress.print(|| format!("{done} of {total} merges"));
        }
        Ok(())
    }
}

/// How often each piece occurs in an iterable of strings.
fn count_pieces(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    splitter: &Splitter,
) -> PyResult<bpe::Counts> {
    let mut counts = bpe::Counts::default();
    let mut texts = texts.try_iter()?;
    let mut batch: Vec<PyBackedStr> = vec![];
    let mut batch_bytes = 0;
    let mut total_bytes = 0;
    let mut progress = Progress::new();
    loop {
        let text = texts
            .next()
            .map(|text| text?.extract::<PyBackedStr>().map_err(PyErr::from))
            .transpose()?;
        let last = text.is_none();
        if let Some(text) = text {
            batch_bytes += text.len();
            batch.push(text);
        }
        if last || batch_bytes >= BATCH_BYTES {
            py.detach(|| bpe::count_pieces(&batch, splitter, &mut counts))
                .map_err(PyValueError::new_err)?;
            py.check_signals()?;
            total_bytes += batch_bytes;
            let megabytes = total_bytes >> 20;
            progress.print(|| format!("{megabytes} MB counted, {} different pieces", counts.len()));
            batch.clear();
            batch_bytes = 0;
        }
        if last {
            return Ok(counts);
        }
    }
}

/// The ids of each text, `prepend` before them. Each thread takes the next text that no other
/// thread has taken.
fn encode_texts(
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
    let mut encoded = vec![vec![]; texts.len()];
    for part in parts {
        for (i, ids) in part? {
            encoded[i] = ids;
        }
    }
    Ok(encoded)
}

/// Prints at most one line every two seconds.
struct Progress(Instant);

impl Progress {
    fn new() -> Self {
        Progress(Instant::now())
    }

    fn print(&mut self, line: impl Fn() -> String) {
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
