//! The architectures of GGUF files: how files of each differ from the checkpoints that they were made from, and what their tensors
//! are called.

/// Which layers' attention slides, where a file has a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sliding {
    All,
    /// Every n-th layer sees the whole context, the others slide.
    AllButEvery(usize),
    /// Only the file can tell.
    Unstated,
    /// No layer: a file with a window is of another model than the family's (OLMo 3).
    Never,
}

/// How files of one architecture differ from the checkpoints that they were made from.
#[derive(Debug)]
pub struct Architecture {
    /// `general.architecture`, and the first word of its metadata keys.
    pub name: &'static str,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// `hidden_act` in config.json.
    pub activation: &'static str,
    /// Rows of the query and key projections are in the order that rotates neighbouring pairs; Hugging Face's rotates halves.
    pub has_interleaved_rope: bool,
    pub sliding: Sliding,
    /// The window where a file names none.
    pub default_window: Option<usize>,
    /// The soft cap on scores where a file names none; none where the architecture has no such cap.
    pub attn_softcap: Option<f64>,
    /// As `attn_softcap`, on logits; 0 where files without the key have none.
    pub logit_softcap: Option<f64>,
    /// Sliding layers have rotary frequencies of their own: `rope.freq_base_swa`, or this, and no scaling.
    pub sliding_theta: Option<f64>,
    /// Scores are scaled by 1/√(hidden / heads) in a model of that many layers, and not by 1/√head_dim (Gemma's 27B).
    pub wide_scale_layers: Option<usize>,
    /// Norms behind attention and MLP too.
    pub has_out_norms: bool,
    /// Gate and up in one matrix, `ffn_up`: rows of the gate first.
    pub may_fuse_gate_up: bool,
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    activation: "silu",
    has_interleaved_rope: true,
    sliding: Sliding::All,
    default_window: None,
    attn_softcap: None,
    logit_softcap: None,
    sliding_theta: None,
    wide_scale_layers: None,
    has_out_norms: false,
    may_fuse_gate_up: false,
};

/// Every architecture that is read. Mistral's files are of `llama`.
pub static ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    Architecture {
        name: "qwen2",
        model_type: "qwen2",
        has_interleaved_rope: false,
        sliding: Sliding::Unstated,
        ..LLAMA
    },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        has_interleaved_rope: false,
        sliding: Sliding::Unstated,
        ..LLAMA
    },
    Architecture { name: "phi3", model_type: "phi3", has_interleaved_rope: false, may_fuse_gate_up: true, ..LLAMA },
    // Every fourth layer has no rotary embedding, by the family's default and in llama.cpp: there is no key for it.
    Architecture { name: "smollm3", model_type: "smollm3", sliding: Sliding::Unstated, ..LLAMA },
    Architecture {
        name: "olmo2",
        model_type: "olmo2",
        has_interleaved_rope: false,
        sliding: Sliding::Never,
        has_out_norms: true,
        ..LLAMA
    },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        activation: "gelu_pytorch_tanh",
        has_interleaved_rope: false,
        sliding: Sliding::AllButEvery(2),
        default_window: Some(4096),
        attn_softcap: Some(50.0),
        logit_softcap: Some(30.0),
        wide_scale_layers: Some(46),
        has_out_norms: true,
        ..LLAMA
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        activation: "gelu_pytorch_tanh",
        has_interleaved_rope: false,
        sliding: Sliding::AllButEvery(6),
        logit_softcap: Some(0.0),
        sliding_theta: Some(10_000.0),
        wide_scale_layers: Some(62),
        has_out_norms: true,
        ..LLAMA
    },
];

/// Hugging Face's name of a module of a block, and GGUF's; [`Architecture::block_name`] knows the norms that depend on the block.
static BLOCK_NAMES: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

impl Architecture {
    /// Returns the architecture of that name.
    pub fn named(name: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name)
    }

    /// Returns the names that are known, for error messages.
    pub fn known_names() -> String {
        ARCHITECTURES.iter().map(|architecture| architecture.name).collect::<Vec<_>>().join(", ")
    }

    /// Returns GGUF's name for a module of a block.
    pub fn block_name(&self, module: &str) -> Option<&'static str> {
        match (module, self.has_out_norms) {
            ("post_attention_layernorm", true) => Some("post_attention_norm"),
            ("post_attention_layernorm", false) => Some("ffn_norm"),
            _ => BLOCK_NAMES.iter().find(|(hf, _)| *hf == module).map(|(_, gguf)| *gguf),
        }
    }

    /// Returns GGUF's name for a tensor of Hugging Face's name.
    pub fn tensor_name(&self, name: &str) -> Option<String> {
        match name {
            "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
            "model.norm.weight" => return Some("output_norm.weight".to_owned()),
            "lm_head.weight" => return Some("output.weight".to_owned()),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (module, kind) = rest.rsplit_once('.')?;
        Some(format!("blk.{layer}.{}.{kind}", self.block_name(module)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(architecture: &str, tensor: &str) -> Option<String> {
        Architecture::named(architecture).expect("a known architecture").tensor_name(tensor)
    }

    #[test]
    fn names_are_translated() {
        let norm = "model.layers.12.post_attention_layernorm.weight";
        assert_eq!(name("llama", norm).as_deref(), Some("blk.12.ffn_norm.weight"));
        assert_eq!(name("gemma2", norm).as_deref(), Some("blk.12.post_attention_norm.weight"));
        assert_eq!(name("olmo2", norm).as_deref(), Some("blk.12.post_attention_norm.weight"));
        let norm = "model.layers.3.pre_feedforward_layernorm.weight";
        assert_eq!(name("gemma3", norm).as_deref(), Some("blk.3.ffn_norm.weight"));
        assert_eq!(name("llama", "model.layers.0.self_attn.q_proj.bias").as_deref(), Some("blk.0.attn_q.bias"));
        assert_eq!(name("phi3", "model.layers.0.mlp.gate_up_proj.weight").as_deref(), Some("blk.0.ffn_up.weight"));
        assert_eq!(name("llama", "something.else"), None);
    }
}
