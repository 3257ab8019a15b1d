//! Text to ids: split, then in each piece merge the neighbours whose token has the lowest rank,
//! until no pair of neighbours is a token.
//!
//! Three things make it fast:
//!
//! 1. Most pieces were seen before. A small table from piece to ids remembers them. It has a fixed
//!    size, that of a processor's cache, and a collision overwrites.
//! 2. A new piece looks up the rank of a pair of ids, not of two strings joined.
//! 3. A long piece keeps its pairs in a heap, so that a megabyte of one letter takes n log n
//!    steps. For a short piece a plain search is faster.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;

use rustc_hash::FxHashMap;

use crate::split::{pack, table_index, Splitter, MAX_PACKED};

const NONE: u32 = u32::MAX; // rank of a pair that is no token; id of a part that was merged away
const HEAP_ABOVE: usize = 100; // pieces of more bytes use the heap
const CACHED_IDS: usize = 3; // with these an entry of the table has 32 bytes
const CACHE_BITS: u32 = 17;

/// A packed piece and its ids: an entry of the table of pieces that were seen before.
#[derive(Clone, Copy)]
struct CacheEntry {
    packed: u128,
    bytes: u8, // 0: the entry is empty
    count: u8,
    ids: [u32; CACHED_IDS],
}

/// What one thread needs to encode. Allocated once, and kept by the encoder between calls.
struct Scratch {
    cache: Vec<CacheEntry>,
    parts: Vec<u32>,
    ranks: Vec<u32>,
}

pub struct Encoder {
    splitter: Splitter,
    id_of_byte: [u32; 256],
    id_of_token: FxHashMap<Box<[u8]>, u32>,
    /// (left id << 32 | right id) -> id of the token that both spell together.
    pairs: FxHashMap<u64, u32>,
    idle_scratch: Mutex<Vec<Scratch>>,
}

impl Encoder {
    /// tokens: by rank. An error is a byte without a token, or two tokens that are the same.
    pub fn new(tokens: &[Vec<u8>], splitter: Splitter) -> Result<Self, String> {
        let mut id_of_token: FxHashMap<Box<[u8]>, u32> = FxHashMap::default();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = id_of_token.insert(token[..].into(), id as u32) {
                return Err(format!("the tokens of ranks {first} and {id} are the same"));
            }
        }
        let mut id_of_byte = [0; 256];
        for byte in 0..=255u8 {
            let Some(&id) = id_of_token.get(&[byte][..]) else {
                return Err(format!("no token for the byte {byte}"));
            };
            id_of_byte[byte as usize] = id;
        }
        let mut pairs = FxHashMap::default();
        for (token, &id) in &id_of_token {
            for cut in 1..token.len() {
                let left = id_of_token.get(&token[..cut]);
                let right = id_of_token.get(&token[cut..]);
                if let (Some(&left), Some(&right)) = (left, right) {
                    pairs.insert(pair_key(left, right), id);
                }
            }
        }
        Ok(Encoder { splitter, id_of_byte, id_of_token, pairs, idle_scratch: Mutex::new(vec![]) })
    }

    /// Appends the ids of `text` to `ids`. An error is a pattern that backtracks without end.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), String> {
        let mut scratch = self.take_scratch();
        ids.reserve(text.len() / 3);
        let text_bytes = text.as_bytes();
        let done = self.splitter.for_each(text, |piece| {
            if piece.len() > MAX_PACKED {
                return self.encode_piece(&text_bytes[piece], &mut scratch, ids);
            }
            let packed = pack(text_bytes, piece.clone());
            let bytes = piece.len() as u8;
            let at = table_index(packed, CACHE_BITS);

            // Seen before: copy its ids.
            let entry = &scratch.cache[at];
            if entry.packed == packed && entry.bytes == bytes {
                let end = ids.len() + entry.count as usize;
                ids.extend_from_slice(&entry.ids); // a fixed number, with no loop to mispredict
                return ids.truncate(end);
            }

            // New: merge, and remember the ids if they are few.
            let from = ids.len();
            self.encode_piece(&text_bytes[piece], &mut scratch, ids);
            let new = &ids[from..];
            if new.len() <= CACHED_IDS {
                let count = new.len() as u8;
                let mut entry = CacheEntry { packed, bytes, count, ids: [0; CACHED_IDS] };
                entry.ids[..new.len()].copy_from_slice(new);
                scratch.cache[at] = entry;
            }
        });
        self.idle_scratch.lock().expect("no thread panics here").push(scratch);
        done
    }

    /// Appends the ids of one piece.
    fn encode_piece(&self, piece: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if let Some(&id) = self.id_of_token.get(piece) {
            return ids.push(id);
        }
        let Scratch { parts, ranks, .. } = scratch;
        parts.clear();
        parts.extend(piece.iter().map(|&b| self.id_of_byte[b as usize]));
        self.merge(parts, ranks);
        ids.extend_from_slice(parts);
    }

    /// The ids of a piece's tokens, as if the split had left it whole.
    pub fn merge_all(&self, piece: &[u8]) -> Vec<u32> {
        let mut parts = piece.iter().map(|&b| self.id_of_byte[b as usize]).collect();
        self.merge(&mut parts, &mut vec![]);
        parts
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(&pair_key(left, right)).copied().unwrap_or(NONE)
    }

    fn merge(&self, parts: &mut Vec<u32>, ranks: &mut Vec<u32>) {
        if parts.len() > HEAP_ABOVE {
            return self.merge_long(parts);
        }
        // ranks[i] is that of the token that parts i and i + 1 spell. A token's id is its rank.
        ranks.clear();
        ranks.extend(parts.windows(2).map(|w| self.rank(w[0], w[1])));
        while let Some((at, &rank)) = ranks.iter().enumerate().min_by_key(|&(_, rank)| rank) {
            if rank == NONE {
                break;
            }
            parts[at] = rank;
            parts.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = self.rank(parts[at - 1], rank);
            }
            if at < ranks.len() {
                ranks[at] = self.rank(rank, parts[at + 1]);
            }
        }
    }

    /// The same with a heap of (rank, place) and a linked list of the remaining parts. An entry of
    /// the heap is stale when the pair at its place no longer has that rank.
    fn merge_long(&self, parts: &mut Vec<u32>) {
        let n = parts.len();
        let mut next: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = BinaryHeap::with_capacity(n);
        let rank_at = |parts: &[u32], next: &[usize], i: usize| match next[i] {
            j if j < n && parts[i] != NONE => self.rank(parts[i], parts[j]),
            _ => NONE,
        };
        for i in 0..n {
            heap.push(Reverse((rank_at(parts, &next, i), i)));
        }
        while let Some(Reverse((rank, i))) = heap.pop() {
            if rank == NONE {
                break;
            }
            if rank_at(parts, &next, i) != rank {
                continue;
            }
            let gone = next[i];
            parts[i] = rank;
            parts[gone] = NONE;
            next[i] = next[gone];
            if next[i] < n {
                previous[next[i]] = i;
            }
            for left in [previous[i], i] {
                if left < n {
                    heap.push(Reverse((rank_at(parts, &next, left), left)));
                }
            }
        }
        parts.retain(|&id| id != NONE);
    }

    fn take_scratch(&self) -> Scratch {
        let idle = self.idle_scratch.lock().expect("no thread panics here").pop();
        idle.unwrap_or_else(|| {
            let empty = CacheEntry { packed: 0, bytes: 0, count: 0, ids: [0; CACHED_IDS] };
            Scratch { cache: vec![empty; 1 << CACHE_BITS], parts: vec![], ranks: vec![] }
        })
    }
}

fn pair_key(left: u32, right: u32) -> u64 {
    (left as u64) << 32 | right as u64
}
