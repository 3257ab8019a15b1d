//! Splitting text into the pieces that merges never cross.
//!
//! A regular expression says what the pieces are, and travels with the vocabulary. Running it
//! would take most of a tokenizer's time, though: it tries seven alternatives at every place and
//! backtracks. The two patterns that we train with are therefore also written by hand, as scanners
//! that look at each character about once. Any other pattern is run by the regex engine. Tests
//! compare both ways on real text and on random Unicode.

use std::ops::Range;
use std::sync::OnceLock;

use fancy_regex::Regex;
use regex_syntax::hir::{Class, HirKind};

/// GPT-4's split, but numbers in runs of one or two digits instead of three: with a small
/// vocabulary, a thousand tokens for three-digit numbers are better spent on words. The
/// alternatives cover every character (letter, number, white space, none of these). They have to,
/// since tiktoken drops what the pattern does not match. This is the only copy of the pattern:
/// Python asks for it with `get_pattern` and stores it beside the ranks.
pub const WORDS: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

/// The split of SuperBPE's second stage (arXiv 2503.13423): numbers, runs of punctuation and runs
/// of spaces stand alone, and everything between two of them is one piece, so that a token may
/// hold several words. The last alternative spells out everything else, which tiktoken needs.
pub const SUPERWORDS: &str = concat!(
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S)",
    r"|(?:(?!\p{N}{1,3}| ?[^\s\p{L}\p{N}]{2,}[\r\n/]*| +(?!\S))[\s\S])+",
);

#[derive(Clone)]
pub enum Splitter {
    Words,
    Superwords,
    Regex(Box<Regex>),
}

impl Splitter {
    /// An error is a pattern that is not valid.
    pub fn new(pattern: &str) -> Result<Self, String> {
        Ok(match pattern {
            WORDS => Splitter::Words,
            SUPERWORDS => Splitter::Superwords,
            _ => Splitter::by_regex(pattern)?,
        })
    }

    pub fn by_regex(pattern: &str) -> Result<Self, String> {
        let regex =
            Regex::new(pattern).map_err(|e| format!("the split pattern is not valid: {e}"))?;
        Ok(Splitter::Regex(Box::new(regex)))
    }

    /// Calls `f` with the range of each piece of `text`, in bytes. An error is a pattern that
    /// backtracks without end.
    pub fn for_each(&self, text: &str, mut f: impl FnMut(Range<usize>)) -> Result<(), String> {
        match self {
            // in closures: a scanner that is called, not inlined, halves the speed of encoding
            Splitter::Words => scan(text, |text, at| word_end(text, at), f),
            Splitter::Superwords => scan(text, |text, at| superword_end(text, at), f),
            Splitter::Regex(regex) => {
                for piece in regex.find_iter(text) {
                    f(piece.map_err(|e| e.to_string())?.range());
                }
            }
        }
        Ok(())
    }
}

#[inline(always)]
fn scan<'t>(
    text: &'t str,
    end: impl Fn(Text<'t>, usize) -> usize,
    mut f: impl FnMut(Range<usize>),
) {
    let text = Text { bytes: text.as_bytes(), classes: classes() };
    let mut at = 0;
    while at < text.bytes.len() {
        let next = end(text, at);
        f(at..next);
        at = next;
    }
}

/// The most bytes of a piece that `pack` takes.
pub const MAX_PACKED: usize = 16;

/// The bytes of a piece of at most 16 as a number: two pieces of the same length are compared in
/// one step.
#[inline(always)]
pub fn pack(text: &[u8], piece: Range<usize>) -> u128 {
    let length = piece.len();
    match text.get(piece.start..piece.start + MAX_PACKED) {
        Some(whole) => {
            let whole = u128::from_le_bytes(whole.try_into().expect("16 bytes"));
            whole & (u128::MAX >> (128 - 8 * length as u32))
        }
        None => {
            let mut buffer = [0; MAX_PACKED];
            buffer[..length].copy_from_slice(&text[piece]);
            u128::from_le_bytes(buffer)
        }
    }
}

/// A hash of a packed piece, as an index into a table of 2^bits entries: the top bits of a product
/// with the golden ratio (Knuth, The Art of Computer Programming, 6.4).
#[inline(always)]
pub fn table_index(packed: u128, bits: u32) -> usize {
    let (low, high) = (packed as u64, (packed >> 64) as u64);
    let mixed = (low ^ high.rotate_left(29)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((mixed ^ mixed >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - bits)) as usize
}

/// What the patterns ask of a character.
const OTHER: u8 = 0; // none of the following
const LETTER: u8 = 1; // \p{L}
const NUMBER: u8 = 2; // \p{N}
const SPACE: u8 = 3; // \s without the next
const NEWLINE: u8 = 4; // \r and \n
const END: u8 = 5; // no character: the end of the text

/// The class of every character, as the regex engine's own tables have it.
fn classes() -> &'static [u8] {
    static CLASSES: OnceLock<Vec<u8>> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut table = vec![OTHER; char::MAX as usize + 1];
        let patterns =
            [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", NEWLINE)];
        for (pattern, class) in patterns {
            let hir = regex_syntax::parse(pattern).expect("a fixed pattern");
            let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else {
                unreachable!("a class of characters")
            };
            for range in ranges.iter() {
                table[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        table
    })
}

#[derive(Clone, Copy)]
struct Text<'t> {
    bytes: &'t [u8],
    classes: &'static [u8],
}

impl Text<'_> {
    /// Class and length in bytes of the character at `at`.
    #[inline(always)]
    fn class(self, at: usize) -> (u8, usize) {
        match self.bytes.get(at) {
            None => (END, 0),
            Some(&b) if b < 128 => (self.classes[b as usize], 1),
            Some(&b) => self.class_beyond_ascii(at, b),
        }
    }

    fn class_beyond_ascii(self, at: usize, first: u8) -> (u8, usize) {
        let length = match first {
            0..=0xDF => 2,
            0xE0..=0xEF => 3,
            _ => 4,
        };
        let lead = (first as usize) & (0x7F >> length);
        let code = self.bytes[at + 1..at + length]
            .iter()
            .fold(lead, |code, &b| code << 6 | (b & 0x3F) as usize);
        (self.classes[code], length)
    }

    /// Where a run of characters of `class` from `at` on ends.
    #[inline(always)]
    fn run(self, mut at: usize, class: u8) -> usize {
        loop {
            match self.class(at) {
                (found, length) if found == class => at += length,
                _ => return at,
            }
        }
    }

    /// Where a run of letters from `at` on ends. It takes eight ASCII characters at a time, since
    /// the end of a loop costs a misprediction.
    #[inline(always)]
    fn letters(self, mut at: usize) -> usize {
        while let Some(eight) = self.bytes.get(at..at + 8) {
            let letters = ascii_letters(u64::from_le_bytes(eight.try_into().expect("8 bytes")));
            if letters < 8 {
                at += letters as usize;
                return if self.bytes[at] < 128 { at } else { self.run(at, LETTER) };
            }
            at += 8;
        }
        self.run(at, LETTER)
    }

    /// Where the run of bytes that are in `set` ends.
    #[inline(always)]
    fn run_of(self, at: usize, set: &[u8]) -> usize {
        at + self.bytes[at..].iter().take_while(|b| set.contains(b)).count()
    }
}

/// How many of eight bytes are ASCII letters, counted from the first up to one that is none. All
/// eight are compared at once: adding 0x80 - 'a' carries into a byte's top bit if the byte is at
/// least an 'a', adding 0x7F - 'z' if it is beyond 'z'.
#[inline(always)]
fn ascii_letters(bytes: u64) -> u32 {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let lower = (bytes | 0x20 * EACH) & 0x7F * EACH;
    let from_a = lower + (0x80 - b'a' as u64) * EACH;
    let beyond_z = lower + (0x7F - b'z' as u64) * EACH;
    let letter = from_a & !beyond_z & !bytes & 0x80 * EACH;
    (letter ^ 0x80 * EACH).trailing_zeros() / 8
}

/// Where the piece of WORDS that begins at `at` ends. The comments name the pattern's alternatives.
#[inline(always)]
fn word_end(text: Text, at: usize) -> usize {
    let (class, length) = text.class(at);
    let second = at + length;
    match class {
        // [^\r\n\p{L}\p{N}]?+\p{L}+
        LETTER => text.letters(second),
        // \p{N}{1,2}
        NUMBER => match text.class(second) {
            (NUMBER, length) => second + length,
            _ => second,
        },
        SPACE => match text.class(second).0 {
            LETTER => text.letters(second),
            //  ?[^\s\p{L}\p{N}]++[\r\n]*
            OTHER if text.bytes[at] == b' ' => text.run_of(text.run(second, OTHER), b"\r\n"),
            _ => space_end(text, at),
        },
        NEWLINE => space_end(text, at),
        _ => {
            if text.bytes[at] == b'\'' {
                if let Some(length) = contraction(&text.bytes[second..]) {
                    return second + length;
                }
            }
            match text.class(second).0 {
                LETTER => text.letters(second),
                _ => text.run_of(text.run(second, OTHER), b"\r\n"),
            }
        }
    }
}

/// Length of what follows the apostrophe: (?i:[sdmt]|ll|ve|re). The long s is an s to a regex that
/// ignores case.
fn contraction(rest: &[u8]) -> Option<usize> {
    match rest {
        [b's' | b'd' | b'm' | b't' | b'S' | b'D' | b'M' | b'T', ..] => Some(1),
        [b'l' | b'L', b'l' | b'L', ..] | [b'v' | b'V' | b'r' | b'R', b'e' | b'E', ..] => Some(2),
        _ => rest.starts_with("ſ".as_bytes()).then_some(2),
    }
}

/// White space that belongs to nothing after it: \s*[\r\n]|\s+(?!\S)|\s+. It ends after the last
/// line break of the run. Without a line break it ends with the text, or else before the run's
/// last character, unless that is the only one.
fn space_end(text: Text, at: usize) -> usize {
    let (mut end, mut last, mut after_newline) = (at, at, None);
    loop {
        let (class, length) = text.class(end);
        match class {
            NEWLINE => after_newline = Some(end + length),
            SPACE => {}
            END => return after_newline.unwrap_or(end),
            _ => return after_newline.unwrap_or(if last > at { last } else { end }),
        }
        last = end;
        end += length;
    }
}

/// Where the piece of SUPERWORDS that begins at `at` ends.
fn superword_end(text: Text, at: usize) -> usize {
    if let Some(end) = standalone_end(text, at) {
        return end;
    }
    let mut end = at + text.class(at).1;
    while end < text.bytes.len() && standalone_end(text, end).is_none() {
        end += text.class(end).1;
    }
    end
}

/// Where a number, a run of punctuation or a run of spaces that begins at `at` ends; None where no
/// such run begins there.
#[inline(always)]
fn standalone_end(text: Text, at: usize) -> Option<usize> {
    let (class, length) = text.class(at);
    let second = at + length;
    match class {
        // \p{N}{1,3}
        NUMBER => {
            let mut end = second;
            for _ in 0..2 {
                match text.class(end) {
                    (NUMBER, length) => end += length,
                    _ => break,
                }
            }
            Some(end)
        }
        //  ?[^\s\p{L}\p{N}]{2,}[\r\n/]*
        OTHER => punctuation_end(text, at),
        SPACE if text.bytes[at] == b' ' => punctuation_end(text, second).or_else(|| {
            //  +(?!\S)
            let end = text.run_of(at, b" ");
            match text.class(end).0 {
                SPACE | NEWLINE | END => Some(end),
                _ => (end > second).then_some(end - 1),
            }
        }),
        _ => None,
    }
}

#[inline(always)]
fn punctuation_end(text: Text, at: usize) -> Option<usize> {
    let (class, length) = text.class(at);
    if class != OTHER || text.class(at + length).0 != OTHER {
        return None;
    }
    Some(text.run_of(text.run(at, OTHER), b"\r\n/"))
}
