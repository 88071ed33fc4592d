//! The tokenizer's class in transformers: which tokens it names by itself, and what it does with `add_bos_token`. Facts are those of
//! transformers 5.24 (`tokenization_auto.py`, `tokenization_utils_tokenizers.py`, `models/*/tokenization_*.py`) and, where said, 4.57.

use super::side_files::SideFiles;
use serde_json::Value;

/// What a class does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// Without `Fast`.
    pub name: &'static str,
    /// Names that it gives where no file does.
    pub defaults: &'static [(&'static str, &'static str)],
    /// Tokens that it adds beside its names.
    pub extra_tokens: &'static [&'static str],
    /// Who decides what is put before and behind a text.
    pub ends: Ends,
    /// The class makes its own normalizer and pre-tokenizer, not those of tokenizer.json.
    pub rebuilds: bool,
    /// In 4.57 `add_bos_token` and `add_eos_token` decide; the value is `add_bos_token` where the file is silent.
    pub flags_in_4_57: Option<bool>,
}

/// Who decides what is put before and behind a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// tokenizer.json's post-processor.
    PostProcessor,
    /// The class: BOS before, nothing behind.
    Bos,
    /// The class: nothing.
    Nothing,
}

/// The class that uses tokenizer.json as it is.
pub const BACKEND: Class = Class {
    name: "TokenizersBackend",
    defaults: &[],
    extra_tokens: &[],
    ends: Ends::PostProcessor,
    rebuilds: false,
    flags_in_4_57: None,
};

const END_OF_TEXT: &str = "<|endoftext|>";
const LLAMA: Class = Class {
    name: "LlamaTokenizer",
    defaults: &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
    extra_tokens: &[],
    ends: Ends::PostProcessor,
    rebuilds: true,
    flags_in_4_57: Some(true),
};

static CLASSES: &[Class] = &[
    LLAMA,
    Class {
        name: "CodeLlamaTokenizer",
        extra_tokens: &["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<FILL_ME>"],
        ends: Ends::Bos,
        ..LLAMA
    },
    Class {
        name: "GemmaTokenizer",
        defaults: &[
            ("unk_token", "<unk>"),
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
        ..LLAMA
    },
    Class {
        name: "CohereTokenizer",
        defaults: &[
            ("unk_token", "<UNK>"),
            ("bos_token", "<BOS_TOKEN>"),
            ("eos_token", "<|END_OF_TURN_TOKEN|>"),
            ("pad_token", "<PAD>"),
            ("cls_token", "<CLS>"),
            ("sep_token", "<SEP>"),
            ("mask_token", "<MASK_TOKEN>"),
        ],
        ..LLAMA
    },
    Class {
        name: "Qwen2Tokenizer",
        defaults: &[("unk_token", END_OF_TEXT), ("eos_token", END_OF_TEXT), ("pad_token", END_OF_TEXT)],
        rebuilds: true,
        ..BACKEND
    },
    Class {
        name: "GPT2Tokenizer",
        defaults: &[("unk_token", END_OF_TEXT), ("bos_token", END_OF_TEXT), ("eos_token", END_OF_TEXT)],
        rebuilds: true,
        ..BACKEND
    },
    Class {
        name: "GPTNeoXTokenizer",
        defaults: &[
            ("unk_token", END_OF_TEXT),
            ("bos_token", END_OF_TEXT),
            ("eos_token", END_OF_TEXT),
            ("pad_token", "<|padding|>"),
        ],
        extra_tokens: &[],
        ends: Ends::Nothing,
        rebuilds: true,
        flags_in_4_57: Some(false),
    },
];

/// Classes that make their own steps around the vocabulary in a way that labpipe does not follow, without `Fast`.
#[rustfmt::skip]
static UNFOLLOWED: &[&str] = &[
    "AlbertTokenizer", "BarthezTokenizer", "BertTokenizer", "BigBirdTokenizer", "BlenderbotTokenizer", "CLIPTokenizer", "CamembertTokenizer",
    "CodeGenTokenizer", "CpmTokenizer", "DebertaTokenizer", "DebertaV2Tokenizer", "DistilBertTokenizer", "ElectraTokenizer", "EsmcTokenizer",
    "FunnelTokenizer", "HerbertTokenizer", "LasrTokenizer", "LayoutLMTokenizer", "LayoutLMv2Tokenizer", "LayoutLMv3Tokenizer",
    "LayoutXLMTokenizer", "LukeTokenizer", "MBart50Tokenizer", "MBartTokenizer", "MLukeTokenizer", "MPNetTokenizer", "MarkupLMTokenizer",
    "NllbTokenizer", "NougatTokenizer", "OpenAIGPTTokenizer", "ParakeetTokenizer", "PegasusTokenizer", "Qwen3_5Tokenizer", "ReformerTokenizer",
    "RemBertTokenizer", "RoFormerTokenizer", "RobertaTokenizer", "SeamlessM4TTokenizer", "Siglip2Tokenizer", "SplinterTokenizer", "T5Tokenizer",
    "Tipsv2Tokenizer", "UdopTokenizer", "VideoPrismTokenizer", "WhisperTokenizer", "XGLMTokenizer", "XLMRobertaTokenizer", "XLNetTokenizer",
];

/// Returns the class that the files name where transformers makes its own steps for it and labpipe does not follow.
pub fn unfollowed(side: &SideFiles) -> Option<&'static str> {
    let declared = named(side.setting("tokenizer_class")).or_else(|| named(side.model_setting("tokenizer_class")))?;
    UNFOLLOWED.iter().copied().find(|name| *name == declared)
}

/// Model types whose files on the hub name the wrong class, among those that labpipe reads.
const WRONG_ON_THE_HUB: &[&str] = &["phi3", "qwen2", "nemotron", "phimoe", "internlm2", "jamba"];

/// Returns the class that `AutoTokenizer` takes for a model.
pub fn class_of(side: &SideFiles, has_byte_level: bool) -> Class {
    let model_type = side.model_setting("model_type").as_str().unwrap_or_default();
    let own = named(side.setting("tokenizer_class"));
    let declared = own.or_else(|| named(side.model_setting("tokenizer_class")));
    let registered = of_model_type(model_type);
    let is_wrong = WRONG_ON_THE_HUB.contains(&model_type);
    let Some(declared) = declared else { return registered.map_or(BACKEND, known) };
    if declared == "LlamaTokenizer" && has_byte_level && !is_wrong && !model_type.contains("mistral") {
        return BACKEND;
    }
    match registered {
        // Where a model type is registered with another class, a special class of that type goes first if hub files are known to be
        // wrong; otherwise a class that the file names.
        Some(registered) if registered != declared => match registered {
            "TokenizersBackend" => BACKEND,
            registered if is_wrong => known(registered),
            _ => known(declared),
        },
        _ => known(declared),
    }
}

/// Returns the class that transformers 4.57 takes.
pub fn class_in_4_57(side: &SideFiles) -> Class {
    let model_type = side.model_setting("model_type").as_str().unwrap_or_default();
    let declared = named(side.setting("tokenizer_class")).or_else(|| named(side.model_setting("tokenizer_class")));
    declared.map_or_else(
        || match model_type {
            "llama" | "mistral" | "mixtral" | "phi3" => LLAMA,
            other => of_model_type(other).map_or(BACKEND, known),
        },
        known,
    )
}

fn named(value: &Value) -> Option<&str> {
    value.as_str().filter(|name| !name.is_empty()).map(|name| name.strip_suffix("Fast").unwrap_or(name))
}

fn known(name: &str) -> Class {
    CLASSES.iter().copied().find(|class| class.name == name).unwrap_or(BACKEND)
}

/// Returns the class that transformers registers with a model type.
fn of_model_type(model_type: &str) -> Option<&'static str> {
    match model_type {
        "gemma" | "gemma2" | "gemma3" | "gemma3_text" => Some("GemmaTokenizer"),
        "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe" => Some("Qwen2Tokenizer"),
        "gpt2" | "phi" => Some("GPT2Tokenizer"),
        "code_llama" => Some("CodeLlamaTokenizer"),
        "cohere" | "cohere2" => Some("CohereTokenizer"),
        "gpt_neox" => Some("GPTNeoXTokenizer"),
        "mistral" | "mixtral" | "phi3" | "olmo2" | "granite" | "nemotron" | "phimoe" | "internlm2" | "jamba" => {
            Some(BACKEND.name)
        }
        _ => None,
    }
}

/// What is put before and behind a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AroundText {
    pub before: Vec<u32>,
    pub behind: Vec<u32>,
}

/// Returns what transformers 4.57 puts around a text, given what the post-processor does and the ids of BOS and EOS.
pub fn around_in_4_57(side: &SideFiles, post_processor: &AroundText, bos: Option<u32>, eos: Option<u32>) -> AroundText {
    let Some(default) = class_in_4_57(side).flags_in_4_57 else { return post_processor.clone() };
    let config = side.tokenizer_config.as_ref().map(|config| &config.fields);
    let flag = |name: &str, default: bool| match config.and_then(|config| config.get(name)) {
        None => default,
        Some(value) => value.as_bool().unwrap_or(false),
    };
    AroundText {
        before: bos.filter(|_| flag("add_bos_token", default)).into_iter().collect(),
        behind: eos.filter(|_| flag("add_eos_token", false)).into_iter().collect(),
    }
}
