//! The text that a pipeline names: files, Parquet columns and documents put together, no more of them than is wanted.

use super::chunks::TextChunks;
use crate::dataset::fetch;
use crate::event::Progress;
use crate::stage::StageError;
use crate::store::read_text_column;
use serde_json::Value;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// How much of a text is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Bytes to keep; all where it is none.
    pub n_bytes: Option<usize>,
    /// Read all of it for its hash, though no more is kept.
    pub hash: bool,
}

impl Wanted {
    pub const ALL: Wanted = Wanted { n_bytes: None, hash: true };
}

/// A text with the places of its documents in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Text {
    pub joined: String,
    /// Byte ranges, in order; what lies between is `join`. Only those of a whole text are complete.
    pub documents: Vec<Range<usize>>,
    /// False where there is more than was wanted.
    pub is_whole: bool,
    /// blake3 of the whole text, where it was wanted.
    pub hash: Option<String>,
    /// What a user must hear of its files.
    pub warnings: Vec<String>,
}

impl Text {
    /// Reads the files of a canonical source. A Parquet file's rows are documents, and so are the parts of a text file
    /// between separators; parts of white space alone are none.
    ///
    /// # Errors
    /// `Read` for a file that isn't there, isn't UTF-8, is empty or lacks the separator; `Cancelled`.
    pub fn read(root: &Path, source: &Value, wanted: Wanted, progress: &dyn Progress) -> Result<Text, StageError> {
        let names: Vec<&str> = match &source["source"] {
            Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
            one => one.as_str().into_iter().collect(),
        };
        let n_chars = source["n_chars"].as_u64().and_then(|n| usize::try_from(n).ok());
        let mut gather = Gather {
            text: Text { is_whole: true, ..Text::default() },
            join: source["join"].as_str().unwrap_or("\n\n"),
            n_chars,
            wanted,
            hasher: blake3::Hasher::new(),
            n: 0,
            n_documents: 0,
            open: None,
            progress,
        };
        let mut path = PathBuf::new();
        for name in &names {
            if gather.is_full() {
                // The files that follow are named by the pipeline; that they are there is checked when it is planned.
                break;
            }
            path = fetch(name, root)
                .map_err(|error| StageError::Read { path: PathBuf::from(name), reason: error.to_string() })?;
            gather.file(&path, source["column"].as_str().unwrap_or("text"), source["separator"].as_str())?;
        }
        let fail = |reason: String| StageError::Read { path, reason };
        let n = gather.n;
        let text = gather.finish();
        match n_chars {
            Some(n_chars) if (text.is_whole || wanted.hash) && n < n_chars => {
                Err(fail(format!("n_chars {n_chars} is more than the text's {n} characters")))
            }
            _ if text.joined.is_empty() => Err(fail("the text is empty".to_owned())),
            _ => Ok(text),
        }
    }
}

/// Puts documents together until there is enough.
struct Gather<'a> {
    text: Text,
    join: &'a str,
    n_chars: Option<usize>,
    wanted: Wanted,
    hasher: blake3::Hasher,
    /// Characters so far.
    n: usize,
    n_documents: usize,
    /// Where the document that is being read begins.
    open: Option<usize>,
    progress: &'a dyn Progress,
}

impl Gather<'_> {
    fn file(&mut self, path: &Path, column: &str, separator: Option<&str>) -> Result<(), StageError> {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet")) {
            let progress = self.progress;
            let mut take = |row: &str| {
                self.begin();
                self.piece(row);
                self.end();
                !self.is_full() && !progress.is_cancelled()
            };
            let read = read_text_column(path, column, &mut take);
            return match read {
                _ if progress.is_cancelled() => Err(StageError::Cancelled),
                read => read.map_err(|error| StageError::Other(error.to_string())),
            };
        }
        let mut chunks = TextChunks::open(path)?;
        match separator {
            None => self.one_document(&mut chunks)?,
            Some(separator) => self.documents(&mut chunks, separator, path)?,
        }
        if chunks.begins_with_bom() {
            self.text.warnings.push(format!(
                "{} begins with a byte order mark, which is tokenized as part of the text; save it as UTF-8 without one",
                path.display()
            ));
        }
        Ok(())
    }

    fn one_document(&mut self, chunks: &mut TextChunks) -> Result<(), StageError> {
        self.begin();
        while !self.is_full() {
            let Some(piece) = self.next(chunks)? else { break };
            self.piece(&piece);
        }
        self.end();
        Ok(())
    }

    fn documents(&mut self, chunks: &mut TextChunks, separator: &str, path: &Path) -> Result<(), StageError> {
        // Text that is not a document's yet: it may hold the beginning of a separator.
        let mut pending = String::new();
        let mut blank = String::new();
        let mut has_separator = false;
        while let Some(piece) = self.next(chunks)? {
            pending.push_str(&piece);
            let mut begin = 0;
            while let Some(at) = pending[begin..].find(separator) {
                has_separator = true;
                self.part(&pending[begin..begin + at], &mut blank);
                self.end_part(&mut blank);
                begin += at + separator.len();
            }
            let mut end = pending.len().saturating_sub(separator.len().saturating_sub(1)).max(begin);
            while !pending.is_char_boundary(end) {
                end += 1;
            }
            self.part(&pending[begin..end], &mut blank);
            pending.drain(..end);
            if self.is_full() {
                if has_separator {
                    return Ok(());
                }
                // What was wanted is there; a separator that is nowhere would be a mistake all the same.
                blank.clear();
            }
        }
        self.part(&pending, &mut blank);
        self.end_part(&mut blank);
        if has_separator {
            return Ok(());
        }
        let reason = format!("the separator {separator:?} is nowhere in it");
        Err(StageError::Read { path: path.to_owned(), reason })
    }

    /// Takes a part of a document; `blank` holds white space that no document owns yet.
    fn part(&mut self, part: &str, blank: &mut String) {
        if self.is_full() {
            return;
        }
        if self.open.is_none() {
            blank.push_str(part);
            if blank.trim().is_empty() {
                return;
            }
            self.begin();
            let text = std::mem::take(blank);
            self.piece(&text);
        } else {
            self.piece(part);
        }
    }

    fn end_part(&mut self, blank: &mut String) {
        blank.clear();
        self.end();
    }

    fn next(&self, chunks: &mut TextChunks) -> Result<Option<String>, StageError> {
        if self.progress.is_cancelled() {
            return Err(StageError::Cancelled);
        }
        chunks.next()
    }

    /// Begins a document.
    fn begin(&mut self) {
        if self.is_full() {
            return;
        }
        if self.n_documents > 0 {
            let join = self.join;
            self.append(join);
        }
        // Where the last of the characters was the join's, no document begins any more.
        if !self.is_full() {
            self.n_documents += 1;
            self.open = Some(self.text.joined.len());
        }
    }

    /// Takes a piece of the document that was begun.
    fn piece(&mut self, piece: &str) {
        if self.open.is_some() {
            self.append(piece);
        }
    }

    fn end(&mut self) {
        if let Some(begin) = self.open.take() {
            self.text.documents.push(begin..self.text.joined.len());
        }
    }

    fn is_full(&self) -> bool {
        self.n_chars.is_some_and(|n_chars| self.n >= n_chars) || (!self.text.is_whole && !self.wanted.hash)
    }

    fn append(&mut self, piece: &str) {
        let room = self.n_chars.map_or(usize::MAX, |n_chars| n_chars - self.n);
        let piece = match piece.char_indices().nth(room) {
            Some((end, _)) => {
                self.n += room;
                &piece[..end]
            }
            None => {
                self.n += piece.chars().count();
                piece
            }
        };
        if self.wanted.hash {
            self.hasher.update(piece.as_bytes());
        }
        if !self.text.is_whole {
            return;
        }
        let space = self.wanted.n_bytes.map_or(usize::MAX, |n_bytes| n_bytes.saturating_sub(self.text.joined.len()));
        if piece.len() <= space {
            self.text.joined.push_str(piece);
            return;
        }
        let end = (0..=space).rev().find(|end| piece.is_char_boundary(*end)).unwrap_or(0);
        self.text.joined.push_str(&piece[..end]);
        self.text.is_whole = false;
    }

    fn finish(mut self) -> Text {
        self.end();
        if self.wanted.hash {
            self.text.hash = Some(self.hasher.finalize().to_hex().to_string());
        }
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::NullProgress;
    use serde_json::json;

    fn read(dir: &Path, mut source: Value) -> Result<Text, StageError> {
        for (name, default) in [("join", json!("\n\n")), ("column", json!("text"))] {
            if source[name].is_null() {
                source[name] = default;
            }
        }
        Text::read(dir, &source, Wanted::ALL, &NullProgress)
    }

    fn documents(text: &Text) -> Vec<&str> {
        text.documents.iter().map(|span| &text.joined[span.clone()]).collect()
    }

    #[test]
    fn texts_are_cut_by_characters_and_empty_or_short_ones_are_errors() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("t.txt");
        std::fs::write(&path, "grüße").expect("a file");
        assert_eq!(read(dir.path(), json!({"source": "t.txt", "n_chars": 3})).expect("a text").joined, "grü");
        let error = |source: Value| read(dir.path(), source).expect_err("an error").to_string();
        assert!(error(json!({"source": "t.txt", "n_chars": 9})).contains("5 characters"));
        assert!(error(json!({"source": "t.txt", "separator": "@"})).contains("nowhere"));
        assert!(error(json!({"source": "u.txt"})).contains("no such file"));
        std::fs::write(&path, "").expect("a file");
        assert!(error(json!({"source": "t.txt"})).contains("empty"));
        std::fs::write(&path, [0xff, 0xfe]).expect("a file");
        assert!(error(json!({"source": "t.txt"})).contains("UTF-8"));
    }

    #[test]
    fn lists_and_separators_make_documents_that_are_joined() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("a.txt"), "one<|end|>two<|end|>\n").expect("a file");
        std::fs::write(dir.path().join("b.txt"), "three<|end|>four").expect("a file");
        let source = json!({"source": ["a.txt", "b.txt"], "separator": "<|end|>", "join": " + "});
        let text = read(dir.path(), source.clone()).expect("a text");
        assert_eq!(text.joined, "one + two + three + four");
        assert_eq!(documents(&text), ["one", "two", "three", "four"]);
        // Cut within a join and within a document.
        for (n_chars, expected, last) in [(10, "one + two ", "two"), (15, "one + two + thr", "thr")] {
            let mut source = source.clone();
            source["n_chars"] = json!(n_chars);
            let text = read(dir.path(), source).expect("a text");
            assert_eq!((text.joined.as_str(), documents(&text).last().copied()), (expected, Some(last)));
        }
        let text = read(dir.path(), json!({"source": ["a.txt", "b.txt"]})).expect("a text");
        assert_eq!(documents(&text), ["one<|end|>two<|end|>\n", "three<|end|>four"]);
    }

    fn read_some(dir: &Path, source: &Value, n_bytes: usize, hash: bool) -> Text {
        Text::read(dir, source, Wanted { n_bytes: Some(n_bytes), hash }, &NullProgress).expect("a text")
    }

    #[test]
    fn no_more_is_kept_than_is_wanted_and_the_hash_is_that_of_all() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let content = "grüße @@ und mehr @@ ".repeat(20_000);
        std::fs::write(dir.path().join("t.txt"), &content).expect("a file");
        for source in
            [json!({"source": "t.txt"}), json!({"source": ["t.txt", "t.txt"], "separator": "@@", "join": "|"})]
        {
            let whole = read(dir.path(), source.clone()).expect("a text");
            let hash = blake3::hash(whole.joined.as_bytes()).to_hex().to_string();
            assert_eq!((whole.is_whole, whole.hash.as_deref()), (true, Some(hash.as_str())));
            for n_bytes in [1, 3, 4, 1000, 70_000, whole.joined.len() - 1, whole.joined.len()] {
                let (hashed, plain) =
                    (read_some(dir.path(), &source, n_bytes, true), read_some(dir.path(), &source, n_bytes, false));
                assert!(whole.joined.starts_with(&hashed.joined) && n_bytes - hashed.joined.len() < 4);
                assert_eq!((&hashed.joined, hashed.is_whole), (&plain.joined, n_bytes == whole.joined.len()));
                assert_eq!((hashed.hash.as_deref(), plain.hash), (Some(hash.as_str()), None));
            }
        }
    }

    /// Separators across the pieces in which a file is read.
    #[test]
    fn documents_are_those_that_splitting_the_whole_text_gives() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (separator, n) in [("@@", 65_530), ("<|end|>", 65_533), ("ü", 32_768), ("aa", 65_536)] {
            let content =
                format!("{}{separator}  \n{separator}b{separator}{}aaa{separator} c", "x".repeat(n), "y".repeat(n));
            std::fs::write(dir.path().join("t.txt"), &content).expect("a file");
            let text = read(dir.path(), json!({"source": "t.txt", "separator": separator})).expect("a text");
            let expected: Vec<&str> = content.split(separator).filter(|part| !part.trim().is_empty()).collect();
            assert_eq!(documents(&text), expected, "{separator}");
        }
    }

    #[test]
    fn a_separator_that_is_nowhere_is_an_error_though_enough_was_read() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("t.txt"), "x".repeat(200_000) + "@").expect("a file");
        let source = |separator: &str| json!({"source": "t.txt", "separator": separator, "n_chars": 5});
        assert_eq!(read(dir.path(), source("@")).expect("a text").joined, "xxxxx");
        assert!(read(dir.path(), source("#")).expect_err("an error").to_string().contains("nowhere"));
    }

    #[test]
    fn a_byte_order_mark_stays_and_is_told() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("t.txt"), "\u{feff}Once").expect("a file");
        let text = read(dir.path(), json!({"source": "t.txt"})).expect("a text");
        assert_eq!(text.joined, "\u{feff}Once");
        assert!(text.warnings[0].contains("t.txt begins with a byte order mark"), "{:?}", text.warnings);
    }
}
