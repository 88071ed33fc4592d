//! How byte-level BPE cuts a text into words before it merges: `tokenizer.ggml.pre` names the rule, the file does not hold it.
//! Each rule here is that of the model's own tokenizer.json.

use serde_json::{Value, json};

/// What a name of `tokenizer.ggml.pre` stands for.
pub struct Rule {
    /// Names that converters write for it.
    pub names: &'static [&'static str],
    /// The regular expression that matches words; none for GPT-2's own.
    pattern: Option<&'static str>,
    /// Every digit is a word of its own, whatever the pattern says.
    splits_digits: bool,
    /// The text is composed first (Unicode NFC).
    pub composes: bool,
    /// A word that is in the vocabulary is that token, whatever the merges say.
    pub ignores_merges: bool,
    /// A text begins with BOS unless the file says otherwise.
    pub adds_bos: bool,
}

/// Llama 3's words: up to three digits go together.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's: the same with every digit alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GPT-4o's (o200k) and Phi-4-mini's: capitals begin a word, and contractions belong to the word before.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral NeMo's: the same with every digit alone and without contractions.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT2: Rule = Rule {
    names: &["gpt-2", "mpt", "olmo", "phi-2", "roberta-bpe"],
    pattern: None,
    splits_digits: false,
    composes: false,
    ignores_merges: false,
    adds_bos: false,
};

static RULES: &[Rule] = &[
    GPT2,
    Rule {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        splits_digits: true,
        ..GPT2
    },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3"],
        pattern: Some(LLAMA3),
        ignores_merges: true,
        adds_bos: true,
        ..GPT2
    },
    // Phi-4's files name dbrx: Llama 3's words, merged as GPT-2's are.
    Rule { names: &["dbrx", "smaug-bpe"], pattern: Some(LLAMA3), ..GPT2 },
    Rule { names: &["gpt-4o"], pattern: Some(GPT4O), ..GPT2 },
    Rule { names: &["tekken"], pattern: Some(TEKKEN), ignores_merges: true, adds_bos: true, ..GPT2 },
    Rule { names: &["qwen2", "deepseek-r1-qwen"], pattern: Some(QWEN2), composes: true, ..GPT2 },
];

impl Rule {
    /// Returns the rule of that name.
    pub fn named(name: &str) -> Option<&'static Rule> {
        RULES.iter().find(|rule| rule.names.contains(&name))
    }

    /// Returns every name that is known, for error messages.
    pub fn known_names() -> String {
        RULES.iter().flat_map(|rule| rule.names).copied().collect::<Vec<_>>().join(", ")
    }

    /// Returns the rule as tokenizer.json has it.
    pub fn to_json(&self) -> Value {
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": self.pattern.is_none(),
        });
        let mut steps = Vec::new();
        if self.splits_digits {
            steps.push(json!({ "type": "Digits", "individual_digits": true }));
        }
        if let Some(pattern) = self.pattern {
            steps.push(json!({
                "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false,
            }));
        }
        steps.push(bytes);
        json!({ "type": "Sequence", "pretokenizers": steps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    /// Python's tokenizers 0.22 cuts this text with the same patterns (`pre_tokenizers.Split(Regex(…), "isolated")`) into these words.
    #[test]
    fn words_are_those_of_the_models_own_rules() {
        let text = "HelloWorld it's 12345 IT'S naïve/CAFÉ\n\n  x=3.14//\nÉcole 你好 don'tGo";
        let gpt_4o = [
            "Hello", "World", " it's", " ", "123", "45", " IT'S", " naïve", "/CAFÉ", "\n\n", " ", " x", "=", "3", ".",
            "14", "//\n", "École", " 你好", " don't", "Go",
        ];
        let tekken = [
            "Hello", "World", " it", "'s", " ", "1", "2", "3", "4", "5", " IT", "'S", " naïve", "/CAFÉ", "\n\n", " ",
            " x", "=", "3", ".", "1", "4", "//\n", "École", " 你好", " don", "'t", "Go",
        ];
        let dbrx = [
            "HelloWorld",
            " it",
            "'s",
            " ",
            "123",
            "45",
            " IT",
            "'S",
            " naïve",
            "/CAFÉ",
            "\n\n",
            " ",
            " x",
            "=",
            "3",
            ".",
            "14",
            "//\n",
            "École",
            " 你好",
            " don",
            "'t",
            "Go",
        ];
        for (name, expected) in [("gpt-4o", &gpt_4o[..]), ("tekken", &tekken[..]), ("dbrx", &dbrx[..])] {
            let rule = Rule::named(name).expect("a known rule").to_json();
            let rule: PreTokenizerWrapper = serde_json::from_value(rule).expect("a pre-tokenizer");
            let mut pieces = PreTokenizedString::from(text);
            rule.pre_tokenize(&mut pieces).expect("words");
            let words = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let words: Vec<&str> = words.iter().map(|(_, (start, end), _)| &text[*start..*end]).collect();
            assert_eq!(words, expected, "{name}");
        }
    }
}
