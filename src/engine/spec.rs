//! What a model is, apart from its weights: the spec that families fill in and the executor interprets.

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

/// How rotary frequencies are scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Each frequency is divided by a number of its own; `head_dim / 2` of them. GGUF files hold Llama 3.1's scaling so.
    Divided { by: Vec<f64> },
    /// Llama 3.1's piecewise scaling (transformers 5.17, `_compute_llama3_parameters`).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: f64,
    },
}

/// Rotary position embedding, rotate-half form.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// What one decoder block is made of; every block of a model is alike.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockSpec {
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub activation: Activation,
    pub norm_eps: f64,
    pub rope: RopeSpec,
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
    pub block: BlockSpec,
}

/// One linear layer of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// `self_attn.q_proj`, below the layer's own name.
    pub name: &'static str,
    pub n_out: usize,
    pub n_in: usize,
    pub bias: bool,
}

impl ModelSpec {
    /// Returns a block's linears in execution order.
    pub fn block_linears(&self) -> [LinearSpec; 7] {
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let (hidden, ffn, block) = (self.hidden_size, self.ffn_size, &self.block);
        let linear = |name, n_out, n_in, bias| LinearSpec { name, n_out, n_in, bias };
        [
            linear("self_attn.q_proj", q, hidden, block.qkv_bias),
            linear("self_attn.k_proj", kv, hidden, block.qkv_bias),
            linear("self_attn.v_proj", kv, hidden, block.qkv_bias),
            linear("self_attn.o_proj", hidden, q, block.o_bias),
            linear("mlp.gate_proj", ffn, hidden, block.mlp_bias),
            linear("mlp.up_proj", ffn, hidden, block.mlp_bias),
            linear("mlp.down_proj", hidden, ffn, block.mlp_bias),
        ]
    }

    /// Returns every linear's module name and shape `[out, in]` in execution order, the output head last.
    pub fn linears(&self) -> Vec<(String, [usize; 2])> {
        let mut linears = Vec::with_capacity(self.n_layers * 7 + 1);
        for layer_idx in 0..self.n_layers {
            for linear in self.block_linears() {
                linears.push((format!("model.layers.{layer_idx}.{}", linear.name), [linear.n_out, linear.n_in]));
            }
        }
        linears.push(("lm_head".to_owned(), [self.vocab_size, self.hidden_size]));
        linears
    }

    /// Returns the number of parameters, tied weights counted once.
    pub fn n_params(&self) -> u64 {
        let per_block: usize = self
            .block_linears()
            .iter()
            .map(|linear| linear.n_out * linear.n_in + if linear.bias { linear.n_out } else { 0 })
            .sum::<usize>()
            + 2 * self.hidden_size;
        let heads = if self.tied_embeddings { 1 } else { 2 };
        (self.n_layers * per_block + self.hidden_size + heads * self.vocab_size * self.hidden_size) as u64
    }
}

impl RopeSpec {
    /// Returns the `head_dim / 2` inverse frequencies in radians per position.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let plain = self.theta.powf(-2.0 * i as f64 / head_dim as f64);
                match &self.scaling {
                    RopeScaling::None => plain,
                    RopeScaling::Divided { by } => plain / by.get(i).copied().unwrap_or(1.0),
                    &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                        let wavelength = std::f64::consts::TAU / plain;
                        if wavelength < original_max_position / high_freq_factor {
                            plain
                        } else if wavelength > original_max_position / low_freq_factor {
                            plain / factor
                        } else {
                            let smooth = (original_max_position / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * plain / factor + smooth * plain
                        }
                    }
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        let plain = RopeSpec { theta: 500_000.0, scaling: RopeScaling::None }.inverse_frequencies(128);
        let scaled = RopeSpec { theta: 500_000.0, scaling }.inverse_frequencies(128);
        assert_eq!(plain.len(), 64);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] - plain[63] / 32.0).abs() < 1e-15);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < *p && *s > *p / 32.0));
    }
}
