//! What a model is, apart from its weights: the spec that families fill in and executors interpret.

use super::rope::RopeSpec;

/// Activation between gate and down projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
    /// Exact GELU.
    Gelu,
}

/// What the attention of one layer is, apart from its weights; most models have one kind, some alternate between two.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// A query sees at most this many keys, its own included: query q sees key k where q − window < k ≤ q.
    pub window: Option<usize>,
    /// `None` where queries and keys are not rotated (NoPE).
    pub rope: Option<RopeSpec>,
}

/// What one RMSNorm over queries or keys normalizes at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself; one weight `[head_dim]` for all heads of a layer.
    Heads,
    /// All heads of a token at once; weights `[q_width]` and `[kv_width]`.
    Projections,
}

/// Which projections of a block add a bias to their product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinearBiases {
    pub q: bool,
    pub k: bool,
    pub v: bool,
    pub o: bool,
    pub gate: bool,
    pub up: bool,
    pub down: bool,
}

impl LinearBiases {
    /// Returns biases on query, key and value alike.
    pub fn qkv(present: bool) -> LinearBiases {
        LinearBiases { q: present, k: present, v: present, ..LinearBiases::default() }
    }
}

/// What one decoder block is made of; every block of a model is alike but for its [`AttentionSpec`].
#[derive(Debug, Clone, PartialEq)]
pub struct BlockSpec {
    /// Which projections add a bias.
    pub biases: LinearBiases,
    /// One matrix `self_attn.qkv_proj`: rows of all query heads, then of all key heads, then of all value heads.
    pub fused_qkv: bool,
    /// One matrix `mlp.gate_up_proj`: rows of the gate, then of the up projection.
    pub fused_gate_up: bool,
    pub activation: Activation,
    pub norm_eps: f64,
    /// Norms multiply by 1 + w. The loader adds the 1, in f32, so that executors multiply by what it gives them. (GGUF files
    /// hold the sum already.)
    pub norm_unit_offset: bool,
    /// Norms before attention and MLP.
    pub in_norms: bool,
    /// Norms after attention and MLP, before each sublayer's output is added to the residual stream.
    pub out_norms: bool,
    /// RMSNorm over queries and keys, before they are rotated.
    pub qk_norm: Option<QkNorm>,
    /// Multiplies queries' products with keys: 1/√head_dim in most families.
    pub attn_scale: f64,
    /// Scores s become cap · tanh(s / cap), after scaling and before the mask.
    pub attn_softcap: Option<f64>,
}

/// A decoder-only model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub family: &'static str,
    pub n_layers: usize,
    pub hidden_size: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub ffn_size: usize,
    pub vocab_size: usize,
    pub n_ctx_max: usize,
    pub tied_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// Multiplies embeddings, after rounding to the compute dtype; 1 in most families.
    pub embedding_scale: f64,
    /// Logits l become cap · tanh(l / cap).
    pub logit_softcap: Option<f64>,
    pub block: BlockSpec,
    /// The kinds of attention that occur: one, or more where layers differ.
    pub attentions: Vec<AttentionSpec>,
    /// Each layer's index into `attentions`, `[n_layers]`.
    pub layer_attentions: Vec<usize>,
}

/// What a linear layer of a block does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearRole {
    Q,
    K,
    V,
    /// Q, K and V in one matrix.
    Qkv,
    O,
    Gate,
    Up,
    /// Gate and up in one matrix.
    GateUp,
    Down,
}

/// One linear layer of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    pub role: LinearRole,
    /// `self_attn.q_proj`, below the layer's own name.
    pub name: &'static str,
    pub n_out: usize,
    pub n_in: usize,
    pub bias: bool,
}

/// Where a norm of a block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormRole {
    /// Before attention.
    Attn,
    /// On queries.
    Q,
    /// On keys.
    K,
    /// Behind attention, before the residual sum.
    AttnOut,
    /// Before the MLP.
    Mlp,
    /// Behind the MLP, before the residual sum.
    MlpOut,
}

/// One RMSNorm of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormSpec {
    pub role: NormRole,
    /// `input_layernorm`, below the layer's own name.
    pub name: &'static str,
    /// Number of weights.
    pub width: usize,
}

impl ModelSpec {
    /// Returns the attention of a layer.
    pub fn attention(&self, layer_idx: usize) -> &AttentionSpec {
        &self.attentions[self.layer_attentions[layer_idx]]
    }

    /// Gives the layers that `is_sliding` names a window and a rotary embedding; the others keep what all had.
    pub fn set_sliding(&mut self, is_sliding: &[bool], window: Option<usize>, rope: Option<RopeSpec>) {
        let full = self.attentions[0].clone();
        let sliding = AttentionSpec { window, rope };
        self.layer_attentions = is_sliding.iter().map(|is_sliding| usize::from(*is_sliding)).collect();
        self.attentions = match (is_sliding.contains(&false), is_sliding.contains(&true)) {
            (true, true) => vec![full, sliding],
            (false, true) => vec![sliding],
            _ => vec![full],
        };
        if self.attentions.len() == 1 {
            self.layer_attentions.fill(0);
        }
    }

    /// Gives each layer its attention, `[n_layers]`. Equal ones become one kind.
    pub fn set_attentions(&mut self, layers: Vec<AttentionSpec>) {
        self.attentions.clear();
        self.layer_attentions.clear();
        for attention in layers {
            let known = self.attentions.iter().position(|known| *known == attention);
            self.layer_attentions.push(known.unwrap_or(self.attentions.len()));
            if known.is_none() {
                self.attentions.push(attention);
            }
        }
    }

    /// Returns true if rotary frequencies of some layer change with the length of the sequence.
    pub fn rope_depends_on_length(&self) -> bool {
        self.attentions.iter().filter_map(|attention| attention.rope.as_ref()).any(RopeSpec::depends_on_length)
    }

    /// Returns what the fused GPU path does not compute of this model, in words, or `None` if it computes all of it.
    pub fn fused_path_lacks(&self) -> Option<String> {
        let mut lacks = Vec::new();
        if self.attentions.iter().any(|attention| attention.rope.is_none()) {
            lacks.push("layers without rotary embedding");
        }
        if self.block.qk_norm == Some(QkNorm::Projections) {
            lacks.push("norms over whole projections");
        }
        if !self.block.in_norms {
            lacks.push("blocks without a norm before a sublayer");
        }
        (!lacks.is_empty()).then(|| lacks.join(", "))
    }

    /// Number of values of all query heads: n_heads · head_dim.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Number of values of all key heads, or of all value heads: n_kv_heads · head_dim.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Returns a block's linears in execution order.
    pub fn block_linears(&self) -> Vec<LinearSpec> {
        let (q, kv, hidden, ffn) = (self.q_width(), self.kv_width(), self.hidden_size, self.ffn_size);
        let (block, biases) = (&self.block, &self.block.biases);
        let linear = |role, name, n_out, n_in, bias| LinearSpec { role, name, n_out, n_in, bias };
        let mut linears = if block.fused_qkv {
            vec![linear(LinearRole::Qkv, "self_attn.qkv_proj", q + 2 * kv, hidden, biases.q || biases.k || biases.v)]
        } else {
            vec![
                linear(LinearRole::Q, "self_attn.q_proj", q, hidden, biases.q),
                linear(LinearRole::K, "self_attn.k_proj", kv, hidden, biases.k),
                linear(LinearRole::V, "self_attn.v_proj", kv, hidden, biases.v),
            ]
        };
        linears.push(linear(LinearRole::O, "self_attn.o_proj", hidden, q, biases.o));
        if block.fused_gate_up {
            linears.push(linear(LinearRole::GateUp, "mlp.gate_up_proj", 2 * ffn, hidden, biases.gate || biases.up));
        } else {
            linears.push(linear(LinearRole::Gate, "mlp.gate_proj", ffn, hidden, biases.gate));
            linears.push(linear(LinearRole::Up, "mlp.up_proj", ffn, hidden, biases.up));
        }
        linears.push(linear(LinearRole::Down, "mlp.down_proj", hidden, ffn, biases.down));
        linears
    }

    /// Returns a block's norms in execution order.
    pub fn block_norms(&self) -> Vec<NormSpec> {
        let BlockSpec { in_norms, out_norms, qk_norm, .. } = self.block;
        let (q_width, k_width) = match qk_norm {
            None | Some(QkNorm::Heads) => (self.head_dim, self.head_dim),
            Some(QkNorm::Projections) => (self.q_width(), self.kv_width()),
        };
        let hidden = self.hidden_size;
        let norms = [
            (in_norms, NormRole::Attn, hidden),
            (qk_norm.is_some(), NormRole::Q, q_width),
            (qk_norm.is_some(), NormRole::K, k_width),
            (out_norms, NormRole::AttnOut, hidden),
            (in_norms, NormRole::Mlp, hidden),
            (out_norms, NormRole::MlpOut, hidden),
        ];
        let norm = |(is_there, role, width): (bool, NormRole, usize)| {
            is_there.then(|| NormSpec { role, name: self.norm_name(role), width })
        };
        norms.into_iter().filter_map(norm).collect()
    }

    /// Returns a norm's module name, below the layer's own.
    pub fn norm_name(&self, role: NormRole) -> &'static str {
        match role {
            NormRole::Attn => "input_layernorm",
            NormRole::Q => "self_attn.q_norm",
            NormRole::K => "self_attn.k_norm",
            NormRole::Mlp if self.block.out_norms => "pre_feedforward_layernorm",
            // Llama's name for the norm before the MLP says where it stands; where sublayers have norms of their outputs it is that of
            // attention.
            NormRole::Mlp | NormRole::AttnOut => "post_attention_layernorm",
            NormRole::MlpOut => "post_feedforward_layernorm",
        }
    }

    /// Returns every linear's module name and shape `[out, in]` in execution order, the output head last.
    pub fn linears(&self) -> Vec<(String, [usize; 2])> {
        let block_linears = self.block_linears();
        let mut linears = Vec::with_capacity(self.n_layers * block_linears.len() + 1);
        for layer_idx in 0..self.n_layers {
            for linear in &block_linears {
                linears.push((format!("model.layers.{layer_idx}.{}", linear.name), [linear.n_out, linear.n_in]));
            }
        }
        linears.push(("lm_head".to_owned(), [self.vocab_size, self.hidden_size]));
        linears
    }

    /// Returns the number of parameters, tied weights counted once.
    pub fn n_params(&self) -> u64 {
        let linear = |linear: &LinearSpec| linear.n_out * linear.n_in + if linear.bias { linear.n_out } else { 0 };
        let per_block = self.block_linears().iter().map(linear).sum::<usize>()
            + self.block_norms().iter().map(|norm| norm.width).sum::<usize>();
        let heads = if self.tied_embeddings { 1 } else { 2 };
        (self.n_layers * per_block + self.hidden_size + heads * self.vocab_size * self.hidden_size) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::families::{ConfigFile, FAMILIES, spec_of};
    use std::path::Path;

    fn spec(case: &str) -> ModelSpec {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(case);
        spec_of(&ConfigFile::read(&folder.join("config.json")).expect("a config")).expect("a spec")
    }

    #[test]
    fn what_the_fused_path_lacks_is_named() {
        let lacking = |case: &str| spec(case).fused_path_lacks();
        for family in FAMILIES.iter().filter(|family| !matches!(family.model_type, "smollm3" | "olmo2")) {
            let case = family.model_type.trim_end_matches("_text");
            assert_eq!(lacking(case), None, "{case}");
        }
        assert_eq!(lacking("smollm3").as_deref(), Some("layers without rotary embedding"));
        let found = lacking("olmo2");
        assert_eq!(found.as_deref(), Some("norms over whole projections, blocks without a norm before a sublayer"));
        let mut all_rotated = spec("smollm3");
        let rotated = all_rotated.attentions[0].clone();
        all_rotated.set_attentions(vec![rotated; all_rotated.n_layers]);
        assert_eq!(all_rotated.fused_path_lacks(), None);
    }

    #[test]
    fn norms_of_a_block_are_those_that_it_has() {
        let norms = |case: &str| -> Vec<(&'static str, usize)> {
            spec(case).block_norms().iter().map(|norm| (norm.name, norm.width)).collect()
        };
        // Queries of 4 heads of 8 values, keys of 2.
        let olmo2 = [
            ("self_attn.q_norm", 32),
            ("self_attn.k_norm", 16),
            ("post_attention_layernorm", 32),
            ("post_feedforward_layernorm", 32),
        ];
        assert_eq!(norms("olmo2"), olmo2);
        assert_eq!(norms("smollm3"), [("input_layernorm", 32), ("post_attention_layernorm", 32)]);
    }

    #[test]
    fn layers_that_attend_alike_are_of_one_kind() {
        let spec = spec("smollm3-sliding");
        assert_eq!((spec.attentions.len(), spec.layer_attentions.clone()), (4, vec![0, 1, 2, 3]));
        let kinds: Vec<(Option<usize>, bool)> =
            spec.attentions.iter().map(|attention| (attention.window, attention.rope.is_some())).collect();
        assert_eq!(kinds, [(None, true), (Some(24), false), (Some(24), true), (None, false)]);
        let mut alike = spec.clone();
        let [first, second] = [0, 1].map(|layer_idx| spec.attention(layer_idx).clone());
        alike.set_attentions(vec![first.clone(), second, first.clone(), first]);
        assert_eq!((alike.attentions.len(), alike.layer_attentions), (2, vec![0, 1, 0, 0]));
    }
}
