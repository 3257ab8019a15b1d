//! The training of a byte-level BPE, free of Python.
//!
//! Text is first split into pieces (about: words), and merges never cross a piece. So a corpus shrinks to a table of
//! unique pieces with their counts, which is a hundred times smaller, and the two halves of the work are:
//!
//! 1. `count_pieces`: split and count. Nearly all of the time, and parallel over documents.
//! 2. `train`: merge the most frequent pair of neighbours until the vocabulary is full. Serial by nature, but each step
//!    touches only the pieces that hold the pair: the counts of all pairs are kept up to date by differences, and a
//!    heap finds the next one. Its entries are lazy: a count that fell since it was pushed is corrected when it surfaces.
//!
//! Ids of the single bytes are in GPT-2's order (printable ones first), and of two pairs with equal counts the smaller
//! pair of ids wins. With both, merges are those of Hugging Face's BpeTrainer, which the tests check.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::BinaryHeap;

use fancy_regex::Regex;
use rayon::prelude::*;
use rustc_hash::FxHashMap;

pub type Pair = (u32, u32);
pub type Counts = FxHashMap<Box<str>, u64>;

/// Called again and again with how far a long loop is: (done, of). An error stops the loop and is handed on.
pub type Tick<'a, E> = &'a mut dyn FnMut(usize, usize) -> Result<(), E>;

/// The 256 bytes in GPT-2's order: those that print as themselves in Latin-1, then the others.
pub fn byte_order() -> Vec<u8> {
    let prints = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let (first, rest): (Vec<u8>, Vec<u8>) = (0..=255).partition(prints);
    [first, rest].concat()
}

/// Adds the pieces of all texts to `counts`. An error is a pattern that backtracks without end.
pub fn count_pieces(texts: &[String], pattern: &Regex, counts: &mut Counts) -> Result<(), String> {
    // One chunk per task, so that each has a few large tables to merge and not hundreds of small ones. The tables
    // borrow their keys from the texts: only a piece that is new to the whole corpus is copied.
    let chunk = texts.len().div_ceil(4 * rayon::current_num_threads()).max(1);
    let tables: Vec<FxHashMap<&str, u64>> = texts
        .par_chunks(chunk)
        // The regex keeps a pool of scratch memory; with a clone per task no two threads contend for it.
        .map_with(pattern.clone(), |pattern, texts| {
            let mut table = FxHashMap::default();
            for text in texts {
                for piece in pattern.find_iter(text) {
                    *table.entry(piece.map_err(|e| e.to_string())?.as_str()).or_insert(0) += 1;
                }
            }
            Ok(table)
        })
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

/// All unique pieces in one flat array of ids; a piece shrinks in place as its pairs merge.
struct Pieces {
    ids: Vec<u32>,
    start: Vec<usize>,
    len: Vec<u32>,
    count: Vec<i64>,
}

impl Pieces {
    fn new(counts: &Counts, id_of_byte: &[u32; 256]) -> Self {
        let mut pieces = Pieces { ids: vec![], start: vec![], len: vec![], count: vec![] };
        for (piece, &count) in counts {
            pieces.start.push(pieces.ids.len());
            pieces.len.push(piece.len() as u32);
            pieces.count.push(count as i64);
            pieces.ids.extend(piece.bytes().map(|b| id_of_byte[b as usize]));
        }
        pieces
    }

    fn ids(&self, i: usize) -> &[u32] {
        &self.ids[self.start[i]..self.start[i] + self.len[i] as usize]
    }

    /// Replaces `pair` by `new` in piece `i`, left to right, and reports every pair of neighbours that went (-1) or
    /// came (+1), the merged pair itself aside.
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

/// The tokens of a vocabulary of `vocab_size` (256 bytes and merges), by rank. Fewer when nothing is left to merge.
pub fn train<E>(counts: &Counts, vocab_size: usize, tick: Tick<E>) -> Result<Vec<Vec<u8>>, E> {
    let mut tokens: Vec<Vec<u8>> = byte_order().into_iter().map(|b| vec![b]).collect();
    let mut id_of_byte = [0; 256];
    for (id, token) in tokens.iter().enumerate() {
        id_of_byte[token[0] as usize] = id as u32;
    }
    let mut id_of_token: FxHashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut pieces = Pieces::new(counts, &id_of_byte);

    // Of each pair: how often it occurs in the corpus, and which pieces hold it (or once did).
    let mut pair_count: FxHashMap<Pair, i64> = FxHashMap::default();
    let mut pair_pieces: FxHashMap<Pair, Vec<u32>> = FxHashMap::default();
    for i in 0..pieces.count.len() {
        for w in pieces.ids(i).windows(2) {
            let pair = (w[0], w[1]);
            *pair_count.entry(pair).or_insert(0) += pieces.count[i];
            remember(pair_pieces.entry(pair), i as u32);
        }
    }
    let mut heap: BinaryHeap<(i64, Reverse<Pair>)> = pair_count.iter().map(|(&p, &c)| (c, Reverse(p))).collect();

    while tokens.len() < vocab_size {
        tick(tokens.len() - 256, vocab_size - 256)?;
        let Some((count, Reverse(pair))) = heap.pop() else { break };
        let now = pair_count[&pair];
        if now < count {
            if now > 0 {
                heap.push((now, Reverse(pair)));
            }
            continue;
        }

        // Two pairs can spell the same token (a+bc, ab+c); it keeps one id, or encoding by rank could not reach both.
        let bytes = [&tokens[pair.0 as usize][..], &tokens[pair.1 as usize][..]].concat();
        let new = *id_of_token.entry(bytes).or_insert_with_key(|bytes| {
            tokens.push(bytes.clone());
            tokens.len() as u32 - 1
        });

        let mut came: Vec<Pair> = vec![];
        for i in pair_pieces.remove(&pair).unwrap_or_default() {
            let weight = pieces.count[i as usize];
            pieces.merge(i as usize, pair, new, |changed, sign| {
                *pair_count.entry(changed).or_insert(0) += sign * weight;
                if sign > 0 {
                    came.push(changed);
                    remember(pair_pieces.entry(changed), i);
                }
            });
        }
        pair_count.insert(pair, 0);
        came.sort_unstable();
        came.dedup();
        heap.extend(came.into_iter().map(|p| (pair_count[&p], Reverse(p))).filter(|&(count, _)| count > 0));
    }
    Ok(tokens)
}

/// Adds piece `i` to a pair's list. Pieces come in order, so that a repetition can only be the last entry.
fn remember(list: Entry<Pair, Vec<u32>>, i: u32) {
    let list = list.or_default();
    if list.last() != Some(&i) {
        list.push(i);
    }
}

/// Ids of a text: in each piece, again and again the pair with the lowest rank. Slow and obvious; inference is
/// tiktoken's, and the tests hold the two against each other.
pub fn encode(text: &str, pattern: &Regex, ranks: &FxHashMap<Vec<u8>, u32>) -> Result<Vec<u32>, String> {
    let mut ids = vec![];
    for piece in pattern.find_iter(text) {
        let piece = piece.map_err(|e| e.to_string())?;
        let mut parts: Vec<Vec<u8>> = piece.as_str().bytes().map(|b| vec![b]).collect();
        while let Some((_, i)) = (1..parts.len())
            .filter_map(|i| ranks.get(&[&parts[i - 1][..], &parts[i][..]].concat()).map(|&rank| (rank, i)))
            .min()
        {
            let right = parts.remove(i);
            parts[i - 1].extend(right);
        }
        ids.extend(parts.iter().map(|part| ranks[part]));
    }
    Ok(ids)
}
