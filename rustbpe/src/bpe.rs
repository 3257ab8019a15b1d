//! The training of a byte-level BPE, free of Python.
//!
//! Text is first split into pieces (roughly: words), and merges never cross the border of a piece.
//! So a corpus shrinks to a table of unique pieces with their counts, which is a hundred times
//! smaller. The two halves of the work are:
//!
//! 1. `count_pieces` splits and counts. It takes most of the time, and is parallel over documents.
//! 2. `train` merges the most frequent pair of neighbouring tokens until the vocabulary is full.
//!    It is serial by nature, but each step touches only the pieces that hold the pair: the counts
//!    of all pairs are kept up to date by differences, and a heap finds the next pair. The heap's
//!    entries are lazy: a count that fell since it was pushed is corrected when it is popped.
//!
//! The ids of the single bytes are in GPT-2's order (printable bytes first), and of two pairs with
//! equal counts the smaller pair of ids wins. With both rules the merges are those of Hugging
//! Face's BpeTrainer, which the tests check.
//!
//! SuperBPE (arXiv 2503.13423) continues from there with pieces of several words: they start as the
//! ids that the first stage gives them, and the same loop merges them, except for what
//! `is_superword` forbids.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::encode::Encoder;
use crate::split::{pack, table_index, Splitter, MAX_PACKED};

pub type Pair = (u32, u32);
pub type Counts = FxHashMap<Box<[u8]>, u64>;

/// Called regularly by a long loop with its progress: (done, total). An error stops the loop, which
/// returns it.
pub type OnProgress<'a, E> = &'a mut dyn FnMut(usize, usize) -> Result<(), E>;

/// The most ids of a piece in SuperBPE's stage. A merge walks through every piece that holds its
/// pair, so that longer pieces are cut.
pub const MAX_PIECE_LEN: usize = 128;

/// The 256 bytes in GPT-2's order: those that print as themselves in Latin-1, then the others.
pub fn byte_order() -> Vec<u8> {
    let prints = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let (first, rest): (Vec<u8>, Vec<u8>) = (0..=255).partition(prints);
    [first, rest].concat()
}

/// Adds the pieces of all texts to `counts`. An error is a pattern that backtracks without end.
pub fn count_pieces<T>(texts: &[T], splitter: &Splitter, counts: &mut Counts) -> Result<(), String>
where
    T: AsRef<str> + Sync,
{
    // Each thread has a table, whose keys are borrowed from the texts: only a piece that is new to
    // the corpus is copied.
    let share = texts.len().div_ceil(rayon::current_num_threads()).max(1);
    let tables: Vec<_> = texts
        .par_chunks(share)
        // The regex keeps a pool of scratch memory; with a clone for each thread none waits for it.
        .map_with(splitter.clone(), |splitter, texts| count_share(texts, splitter))
        .collect::<Result<_, String>>()?;
    for table in tables {
        for (piece, count) in table {
            match counts.get_mut(piece) {
                Some(sum) => *sum += count,
                None => {
                    counts.insert(piece.into(), count);
                }
            }
        }
    }
    Ok(())
}

/// The pieces of a few texts and how often each occurs.
///
/// Frequent pieces are counted in a small table that fits the processor's cache. A piece that takes
/// another one's place there moves the other one's count to the large table.
fn count_share<'t, T: AsRef<str>>(
    texts: &'t [T],
    splitter: &Splitter,
) -> Result<FxHashMap<&'t [u8], u64>, String> {
    const BITS: u32 = 14;
    let mut table: FxHashMap<&[u8], u64> = FxHashMap::default();
    // (packed piece, piece, count)
    let mut recent: Vec<(u128, &[u8], u64)> = vec![(0, &[], 0); 1 << BITS];
    for text in texts {
        let text = text.as_ref();
        let bytes = text.as_bytes();
        splitter.for_each(text, |piece| {
            let slice = &bytes[piece.clone()];
            if slice.len() > MAX_PACKED {
                *table.entry(slice).or_insert(0) += 1;
                return;
            }
            let packed = pack(bytes, piece);
            let entry = &mut recent[table_index(packed, BITS)];
            if entry.0 == packed && entry.1.len() == slice.len() {
                entry.2 += 1;
            } else {
                let (_, old, count) = std::mem::replace(entry, (packed, slice, 1));
                if count > 0 {
                    *table.entry(old).or_insert(0) += count;
                }
            }
        })?;
    }
    for (_, piece, count) in recent.into_iter().filter(|entry| entry.2 > 0) {
        *table.entry(piece).or_insert(0) += count;
    }
    Ok(table)
}

/// All unique pieces in one flat array of ids; a piece shrinks in place as its pairs merge.
#[derive(Default)]
pub struct Pieces {
    ids: Vec<u32>,
    start: Vec<usize>,
    len: Vec<u32>,
    count: Vec<i64>,
}

impl Pieces {
    /// Pieces of single bytes, ids by `byte_order`.
    pub fn of_bytes(counts: &Counts) -> Self {
        let mut id_of_byte = [0; 256];
        for (id, byte) in byte_order().into_iter().enumerate() {
            id_of_byte[byte as usize] = id as u32;
        }
        let mut pieces = Pieces::default();
        for (piece, &count) in counts {
            pieces.add(piece.iter().map(|&b| id_of_byte[b as usize]), count);
        }
        pieces
    }

    /// Pieces of the tokens that `encoder` has, whatever its split. Long pieces are cut.
    pub fn of_tokens(counts: &Counts, encoder: &Encoder) -> Self {
        let each: Vec<(&Box<[u8]>, &u64)> = counts.iter().collect();
        let encoded: Vec<Vec<u32>> =
            each.par_iter().map(|(piece, _)| encoder.merge_all(piece)).collect();
        let mut pieces = Pieces::default();
        for (ids, (_, &count)) in encoded.iter().zip(each) {
            for part in ids.chunks(MAX_PIECE_LEN) {
                pieces.add(part.iter().copied(), count);
            }
        }
        pieces
    }

    fn add(&mut self, ids: impl Iterator<Item = u32>, count: u64) {
        self.start.push(self.ids.len());
        self.ids.extend(ids);
        self.len.push((self.ids.len() - self.start[self.start.len() - 1]) as u32);
        self.count.push(count as i64);
    }

    fn ids(&self, i: usize) -> &[u32] {
        &self.ids[self.start[i]..self.start[i] + self.len[i] as usize]
    }

    /// Replaces `pair` by `new` in piece `i`, left to right. Calls `changed` with every pair of
    /// neighbours that disappeared (-1) or appeared (+1), except the merged pair itself.
    fn merge(&mut self, i: usize, pair: Pair, new: u32, mut changed: impl FnMut(Pair, i64)) {
        let (start, len) = (self.start[i], self.len[i] as usize);
        let ids = &mut self.ids[start..start + len];
        let (mut read, mut write) = (0, 0);
        while read < len {
            if read + 1 < len && (ids[read], ids[read + 1]) == pair {
                if write > 0 {
                    changed((ids[write - 1], pair.0), -1);
                    changed((ids[write - 1], new), 1);
                }
                if read + 2 < len {
                    changed((pair.1, ids[read + 2]), -1);
                    changed((new, ids[read + 2]), 1);
                }
                ids[write] = new;
                read += 2;
            } else {
                ids[write] = ids[read];
                read += 1;
            }
            write += 1;
        }
        self.len[i] = write as u32;
    }
}

/// How often a pair of neighbours occurs in the corpus, and which pieces hold it (or once did).
#[derive(Default)]
struct PairStats {
    count: i64,
    pieces: Vec<u32>,
}

impl PairStats {
    /// Counts an occurrence in piece `i`. Pieces come in order, so that a repetition can only be
    /// the last entry.
    fn add(&mut self, i: u32, weight: i64) {
        self.count += weight;
        if self.pieces.last() != Some(&i) {
            self.pieces.push(i);
        }
    }
}

/// Adds merged tokens to `tokens` until there are `vocab_size`, or no pair remains that `allowed`
/// accepts.
pub fn train<E>(
    mut pieces: Pieces,
    tokens: &mut Vec<Vec<u8>>,
    vocab_size: usize,
    allowed: impl Fn(&[u8]) -> bool,
    on_progress: OnProgress<E>,
) -> Result<(), E> {
    let mut id_of_token: FxHashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut pairs: FxHashMap<Pair, PairStats> = FxHashMap::default();
    for i in 0..pieces.count.len() {
        for w in pieces.ids(i).windows(2) {
            pairs.entry((w[0], w[1])).or_default().add(i as u32, pieces.count[i]);
        }
    }
    let mut heap: BinaryHeap<(i64, Reverse<Pair>)> =
        pairs.iter().map(|(&p, n)| (n.count, Reverse(p))).collect();

    let first = tokens.len();
    while tokens.len() < vocab_size {
        on_progress(tokens.len() - first, vocab_size - first)?;
        let Some((count, Reverse(pair))) = heap.pop() else { break };

        // A stale entry: the count has fallen since it was pushed.
        let now = pairs.get(&pair).map_or(0, |stats| stats.count);
        if now < count {
            if now > 0 {
                heap.push((now, Reverse(pair)));
            }
            continue;
        }

        let bytes = [&tokens[pair.0 as usize][..], &tokens[pair.1 as usize][..]].concat();
        if !allowed(&bytes) {
            continue;
        }

        // Two pairs can spell the same token (a+bc, ab+c). The token keeps one id, since encoding
        // by rank could not produce the other.
        let new = *id_of_token.entry(bytes).or_insert_with_key(|bytes| {
            tokens.push(bytes.clone());
            tokens.len() as u32 - 1
        });

        // Merge the pair in all pieces that hold it, and update the counts of its neighbours.
        let mut new_pairs: Vec<Pair> = vec![];
        for i in pairs.remove(&pair).unwrap_or_default().pieces {
            let weight = pieces.count[i as usize];
            pieces.merge(i as usize, pair, new, |changed, sign| {
                if sign > 0 {
                    pairs.entry(changed).or_default().add(i, weight);
                    new_pairs.push(changed);
                } else if let Some(stats) = pairs.get_mut(&changed) {
                    stats.count -= weight;
                }
            });
        }
        new_pairs.sort_unstable();
        new_pairs.dedup();
        for pair in new_pairs {
            let count = pairs.get(&pair).map_or(0, |stats| stats.count);
            if count > 0 {
                heap.push((count, Reverse(pair)));
            }
        }
    }
    Ok(())
}

/// Whether SuperBPE may make this token: at most four words, and nothing across ": ", which
/// separates a question's "Answer:" from the answer.
pub fn is_superword(token: &[u8]) -> bool {
    let words = token.split(|&b| b == b' ').filter(|word| !word.is_empty()).count();
    let crosses_colon = token.windows(2).any(|w| w == b": ");
    words <= 4 && !crosses_colon
}
