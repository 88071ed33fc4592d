//! From a text to token ids, step by step as the tokenizers crate (0.23) does it, but so that a failing regular expression is an error:
//! the crate takes the end of its search for the end of the text. A text that grows beyond bounds is an error too, and a thread that
//! was given up stops at the next step.

use fancy_regex::Regex;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pattern::{Invert, Pattern};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    SplitDelimiterBehavior, Tokenizer,
};

/// What `ByteLevel` splits by (`tokenizers` 0.23.2, src/pre_tokenizers/byte_level.rs).
const GPT2_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Bytes that normalizing and splitting may make of one byte of text, beside [`FREE_BYTES`]. Replacing a space by `▁` makes three.
const MAX_GROWTH: usize = 32;
/// Bytes that any text may grow to.
const FREE_BYTES: usize = 1 << 16;

type CrateResult<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Why a step could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("stopped")]
    Stopped,
    #[error(
        "its {step} makes more than {limit} bytes of a text of {n_bytes}; labpipe refuses tokenizers that inflate texts so"
    )]
    Growth { step: &'static str, n_bytes: usize, limit: usize },
    #[error(
        "its pattern {pattern:?} needs too many steps on this text ({cause}); every token after that place would be wrong. Break long \
         runs of the same characters, or simplify the pattern"
    )]
    Pattern { pattern: String, cause: String },
    #[error("{0}")]
    Crate(String),
}

/// A tokenizer that is ready to encode.
pub struct Steps {
    tokenizer: Tokenizer,
    normalizer: Vec<Normalize>,
    pre_tokenizer: Vec<Split>,
}

enum Normalize {
    /// Replaces what a pattern matches.
    Regex(Regex, String),
    /// Replaces a text: pattern and content say how much it grows.
    Text(NormalizerWrapper, String, usize),
    Other(NormalizerWrapper),
}

enum Split {
    Regex {
        regex: Regex,
        behavior: SplitDelimiterBehavior,
        invert: bool,
    },
    /// `ByteLevel`'s own pattern, after the space that it may put before a text.
    Words {
        regex: Regex,
        add_prefix_space: bool,
    },
    Other(PreTokenizerWrapper),
}

impl Steps {
    /// Takes a tokenizer apart; `normalizer` and `pre_tokenizer` are tokenizer.json's fields.
    ///
    /// # Errors
    /// What is wrong with a step.
    pub fn new(tokenizer: Tokenizer, normalizer: &Value, pre_tokenizer: &Value) -> Result<Steps, String> {
        Ok(Steps {
            tokenizer,
            normalizer: leaves(normalizer, "normalizers").into_iter().map(normalize).collect::<Result<_, _>>()?,
            pre_tokenizer: leaves(pre_tokenizer, "pretokenizers")
                .into_iter()
                .map(split)
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .flatten()
                .collect(),
        })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Returns a text's token ids; nothing is added before or behind. It ends early with `Stopped` once `stop` is set.
    ///
    /// # Errors
    /// Every kind of `StepError`.
    pub fn ids(&self, text: &str, stop: &AtomicBool) -> Result<Vec<u32>, StepError> {
        let watch = Watch::new(text, stop);
        let pieces = self.pieces(text, &watch)?;
        let mut ids = Vec::with_capacity(text.len() / 4);
        for (piece, token) in splits(&pieces) {
            if watch.is_stopped() {
                return Err(StepError::Stopped);
            }
            match token {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => {
                    let tokens = self
                        .tokenizer
                        .get_model()
                        .tokenize(piece)
                        .map_err(|error| StepError::Crate(error.to_string()))?;
                    ids.extend(tokens.iter().map(|token| token.id));
                }
            }
        }
        Ok(ids)
    }

    /// Returns the byte of the text at which each of its tokens begins; in the order of [`Steps::ids`].
    ///
    /// # Errors
    /// As [`Steps::ids`].
    pub fn starts(&self, text: &str, stop: &AtomicBool) -> Result<Vec<usize>, StepError> {
        let watch = Watch::new(text, stop);
        let mut pieces = self.pieces(text, &watch)?;
        let tokenized = pieces.tokenize(|piece| {
            if watch.is_stopped() {
                return Err(StepError::Stopped.into());
            }
            self.tokenizer.get_model().tokenize(piece.get())
        });
        watch.outcome()?;
        let encoding = tokenized.and_then(|()| pieces.into_encoding(None, 0, OffsetType::Byte));
        let encoding = encoding.map_err(|error| StepError::Crate(error.to_string()))?;
        Ok(encoding.get_offsets().iter().map(|(begin, _)| *begin).collect())
    }

    /// Normalizes a text and splits it into the pieces that the model tokenizes.
    fn pieces(&self, text: &str, watch: &Watch<'_>) -> Result<PreTokenizedString, StepError> {
        let normalizer = Normalizers { steps: &self.normalizer, watch };
        let mut pieces = self.tokenizer.get_added_vocabulary().extract_and_normalize(Some(&normalizer), text);
        watch.outcome()?;
        for step in &self.pre_tokenizer {
            let done = step.apply(&mut pieces, watch);
            watch.outcome()?;
            done.map_err(|error| StepError::Crate(error.to_string()))?;
            let n_bytes = splits(&pieces).iter().map(|(piece, _)| piece.len()).sum();
            watch.grown("pre_tokenizer", n_bytes);
            watch.outcome()?;
        }
        Ok(pieces)
    }
}

fn splits(pieces: &PreTokenizedString) -> Vec<(&str, &Option<Vec<tokenizers::Token>>)> {
    let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
    splits.into_iter().map(|(piece, _, tokens)| (piece, tokens)).collect()
}

/// Returns the steps of a field: itself, or the members of a sequence, in order.
fn leaves<'a>(value: &'a Value, members: &str) -> Vec<&'a Value> {
    match value {
        Value::Null => Vec::new(),
        value if value["type"] == "Sequence" => {
            value[members].as_array().into_iter().flatten().flat_map(|member| leaves(member, members)).collect()
        }
        value => vec![value],
    }
}

fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| format!("pattern {pattern:?}: {error}"))
}

fn normalize(leaf: &Value) -> Result<Normalize, String> {
    let own = || serde_json::from_value::<NormalizerWrapper>(leaf.clone()).map_err(|error| error.to_string());
    let content = leaf["content"].as_str().unwrap_or_default();
    if leaf["type"] == "Replace" {
        if let Some(pattern) = leaf["pattern"]["Regex"].as_str() {
            return Ok(Normalize::Regex(regex(pattern)?, content.to_owned()));
        }
        if let Some(pattern) = leaf["pattern"]["String"].as_str() {
            return Ok(Normalize::Text(own()?, pattern.to_owned(), content.len()));
        }
    }
    own().map(Normalize::Other)
}

/// Returns the steps that stand for one of tokenizer.json's.
fn split(leaf: &Value) -> Result<Vec<Split>, String> {
    let own = || serde_json::from_value::<PreTokenizerWrapper>(leaf.clone()).map_err(|error| error.to_string());
    if leaf["type"] == "Split"
        && let Some(pattern) = leaf["pattern"]["Regex"].as_str()
    {
        let behavior = serde_json::from_value(leaf["behavior"].clone()).map_err(|error| error.to_string())?;
        let invert = leaf["invert"].as_bool().unwrap_or(false);
        return Ok(vec![Split::Regex { regex: regex(pattern)?, behavior, invert }]);
    }
    Ok(match own()? {
        PreTokenizerWrapper::ByteLevel(mut bytes) if bytes.use_regex => {
            let words = Split::Words { regex: regex(GPT2_WORDS)?, add_prefix_space: bytes.add_prefix_space };
            (bytes.use_regex, bytes.add_prefix_space) = (false, false);
            vec![words, Split::Other(PreTokenizerWrapper::ByteLevel(bytes))]
        }
        other => vec![Split::Other(other)],
    })
}

/// What all steps of one text look at.
struct Watch<'a> {
    stop: &'a AtomicBool,
    /// The first that went wrong: the crate drops errors of normalizers.
    error: Mutex<Option<StepError>>,
    n_bytes: usize,
    limit: usize,
}

impl<'a> Watch<'a> {
    fn new(text: &str, stop: &'a AtomicBool) -> Watch<'a> {
        Watch {
            stop,
            error: Mutex::new(None),
            n_bytes: text.len(),
            limit: text.len().saturating_mul(MAX_GROWTH).saturating_add(FREE_BYTES),
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn fail(&self, error: StepError) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn outcome(&self) -> Result<(), StepError> {
        match self.error.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None if self.is_stopped() => Err(StepError::Stopped),
            None => Ok(()),
        }
    }

    /// Returns false where a step makes too much.
    fn grown(&self, step: &'static str, n_bytes: usize) -> bool {
        if n_bytes > self.limit {
            self.fail(StepError::Growth { step, n_bytes: self.n_bytes, limit: self.limit });
        }
        n_bytes <= self.limit
    }
}

/// Finds what a pattern matches; an error of the search is the whole search's.
struct Guarded<'a> {
    regex: &'a Regex,
    watch: &'a Watch<'a>,
}

impl Pattern for Guarded<'_> {
    fn find_matches(&self, inside: &str) -> CrateResult<Vec<((usize, usize), bool)>> {
        if inside.is_empty() {
            return Ok(vec![((0, 0), false)]);
        }
        let (mut found, mut end) = (Vec::new(), 0);
        for one in self.regex.find_iter(inside) {
            let one = match one {
                Ok(one) => one,
                Err(error) => {
                    let (pattern, cause) = (self.regex.as_str().to_owned(), error.to_string());
                    self.watch.fail(StepError::Pattern { pattern, cause });
                    return Err(error.into());
                }
            };
            if self.watch.is_stopped() {
                self.watch.fail(StepError::Stopped);
                return Err(StepError::Stopped.into());
            }
            if one.start() != end {
                found.push(((end, one.start()), false));
            }
            found.push(((one.start(), one.end()), true));
            end = one.end();
        }
        if end != inside.len() {
            found.push(((end, inside.len()), false));
        }
        Ok(found)
    }
}

/// All normalizers as the one that the crate asks for.
struct Normalizers<'a> {
    steps: &'a [Normalize],
    watch: &'a Watch<'a>,
}

impl Normalizer for Normalizers<'_> {
    fn normalize(&self, text: &mut NormalizedString) -> CrateResult<()> {
        for step in self.steps {
            if !step.apply(text, self.watch)? {
                break;
            }
        }
        Ok(())
    }
}

impl Normalize {
    /// Returns false where the text grew too much, which the watch then holds.
    fn apply(&self, text: &mut NormalizedString, watch: &Watch<'_>) -> CrateResult<bool> {
        const STEP: &str = "normalizer";
        match self {
            Normalize::Regex(regex, content) => {
                let matches = Guarded { regex, watch }.find_matches(text.get())?;
                let n = matches.iter().filter(|(_, is_match)| *is_match).count();
                if !watch.grown(STEP, text.len().saturating_add(n.saturating_mul(content.len()))) {
                    return Ok(false);
                }
                text.replace(Guarded { regex, watch }, content)?;
            }
            Normalize::Text(step, pattern, content) => {
                let n = if pattern.is_empty() { text.len() + 1 } else { text.get().matches(pattern.as_str()).count() };
                let growth = n.saturating_mul(content.saturating_sub(pattern.len()));
                if !watch.grown(STEP, text.len().saturating_add(growth)) {
                    return Ok(false);
                }
                step.normalize(text)?;
            }
            Normalize::Other(step) => step.normalize(text)?,
        }
        Ok(watch.grown(STEP, text.len()) && !watch.is_stopped())
    }
}

impl Split {
    fn apply(&self, pieces: &mut PreTokenizedString, watch: &Watch<'_>) -> CrateResult<()> {
        match self {
            Split::Regex { regex, behavior, invert: false } => {
                pieces.split(|_, piece| piece.split(Guarded { regex, watch }, *behavior))
            }
            Split::Regex { regex, behavior, invert: true } => {
                pieces.split(|_, piece| piece.split(Invert(Guarded { regex, watch }), *behavior))
            }
            Split::Words { regex, add_prefix_space } => pieces.split(|_, mut piece| {
                if *add_prefix_space && !piece.get().starts_with(' ') {
                    piece.prepend(" ");
                }
                piece.split(Guarded { regex, watch }, SplitDelimiterBehavior::Isolated)
            }),
            Split::Other(step) => step.pre_tokenize(pieces),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    static GO: AtomicBool = AtomicBool::new(false);

    fn steps(file: &Path, change: impl FnOnce(&mut Value)) -> Steps {
        let mut json: Value = serde_json::from_slice(&std::fs::read(file).expect("the file")).expect("JSON");
        change(&mut json);
        let tokenizer = Tokenizer::from_bytes(json.to_string()).expect("a tokenizer");
        Steps::new(tokenizer, &json["normalizer"], &json["pre_tokenizer"]).expect("steps")
    }

    fn own() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/bytes-512/tokenizer.json")
    }

    fn model(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name).join("tokenizer.json")
    }

    /// The crate's own `encode` is the reference, over several normalizers and pre-tokenizers.
    #[test]
    fn ids_are_those_of_the_tokenizers_crate() {
        let split = |pattern: &str, behavior: &str, invert: bool| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false});
        let replace = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "});
        let cases: [(Value, Value); 5] = [
            (
                Value::Null,
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
            ),
            (
                json!({"type": "NFC"}),
                json!({"type": "Sequence", "pretokenizers": [split(r"\p{N}|\s+(?!\S)|\s+|\S+", "Isolated", false), bytes]}),
            ),
            (
                json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, replace]}),
                split(r"\s", "MergedWithNext", false),
            ),
            (Value::Null, split(r"\w+|[^\w\s]+", "Removed", true)),
            (Value::Null, json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true})),
        ];
        let text =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments/data/tinystories.txt"))
                .expect("a text");
        let texts = ["", " a  b\n\n c<|turn|>d ", "Grüße, 你好 🌍! don't 1234", &text[..60_000]];
        for file in [own(), model("stories260k"), model("tinystories-656k")] {
            for (normalizer, pre_tokenizer) in &cases {
                for as_it_is in [true, false] {
                    let steps = steps(&file, |json| {
                        if !as_it_is {
                            (json["normalizer"], json["pre_tokenizer"]) = (normalizer.clone(), pre_tokenizer.clone());
                        }
                    });
                    for text in texts {
                        let expected = steps.tokenizer().encode(text, false).expect("tokens");
                        assert_eq!(
                            steps.ids(text, &GO).expect("tokens"),
                            expected.get_ids(),
                            "{pre_tokenizer} {text:.40?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_pattern_that_gives_up_is_an_error() {
        let pattern =
            json!({"type": "Split", "pattern": {"Regex": "(a|a)*(?!a)b|."}, "behavior": "Isolated", "invert": false});
        let split = steps(&own(), |json| json["pre_tokenizer"] = pattern);
        let text = "a".repeat(60);
        let error = split.ids(&text, &GO).expect_err("an error").to_string();
        assert!(error.contains("(a|a)*") && error.contains("too many steps"), "{error}");
        let replace = json!({"type": "Replace", "pattern": {"Regex": "(a|a)*(?!a)b"}, "content": "x"});
        let replace = steps(&own(), |json| json["normalizer"] = replace);
        assert!(matches!(replace.ids(&text, &GO), Err(StepError::Pattern { .. })));
        // A million spaces before a word exhaust the stack of GPT-2's own pattern.
        let text = format!("a{}b", " ".repeat(1_500_000));
        let found = steps(&own(), |_| {}).ids(&text, &GO);
        assert!(matches!(found, Ok(_) | Err(StepError::Pattern { .. })));
    }

    #[test]
    fn texts_that_grow_without_bound_are_errors() {
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let by_regex = json!({"type": "Replace", "pattern": {"Regex": "a|b"}, "content": "aa"});
        for step in
            [double, by_regex, json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(1 << 20)})]
        {
            // Set where no added token is normalized while the tokenizer is made.
            let steps =
                steps(&own(), |json| json["normalizer"] = json!({"type": "Sequence", "normalizers": vec![step; 40]}));
            let error = steps.ids(&"a".repeat(1000), &GO).expect_err("an error").to_string();
            assert!(error.contains("normalizer makes more than"), "{error}");
        }
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let steps =
            steps(&own(), |json| json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": vec![bytes; 40]}));
        assert!(matches!(steps.ids(&"é".repeat(1000), &GO), Err(StepError::Growth { .. })));
    }

    #[test]
    fn a_thread_that_was_given_up_stops() {
        let steps = steps(&own(), |_| {});
        assert!(matches!(steps.ids("Once upon a time", &AtomicBool::new(true)), Err(StepError::Stopped)));
    }
}
