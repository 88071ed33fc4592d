//! What a stage will take of a GPU's memory beside weights and cache, from a model's shapes.

use super::arena::{Layout, Mlp, Needs};
use super::decode::Decoder;
use super::model::{FILLED_TOKENS, logit_rows};
use super::pass::GATED_BYTES;
use super::products::{PANEL_BYTES, PANEL_ROWS};
use crate::engine::spec::ModelSpec;
use crate::inference::{ModelRecipe, Workload};
use crate::units::DType;

/// cubecl's page for small buffers, and what it rounds others up by.
const SMALL_BYTES: u64 = 16 << 20;

/// What cuBLAS is given to work in.
const WORKSPACE_BYTES: u64 = 8 << 20;

/// What a pass's memory depends on.
pub struct Shape<'a> {
    pub spec: &'a ModelSpec,
    pub compute: DType,
    pub recipe: &'a ModelRecipe,
    /// What is not quantized is stored in.
    pub dtype: DType,
    /// Quantized rows are decoded to panels for cuBLAS.
    pub has_panels: bool,
}

impl Shape<'_> {
    /// Returns the most that a stage's passes and steps take.
    pub fn working_bytes(&self, work: &Workload) -> u64 {
        let spec = self.spec;
        let follows_length = spec.rope_depends_on_length();
        let n = match work.n_gen > 0 && !follows_length {
            true => work.n_pass.min(FILLED_TOKENS),
            false => work.n_pass,
        };
        let n_ctx = work.n_ctx.max(work.n_pass) as u64;
        let ropes = spec.attentions.iter().filter_map(|attention| attention.rope.as_ref());
        let ropes: u64 = ropes.map(|rope| 4 * rope.rotary_dim as u64 * n_ctx).sum();
        let step = if work.n_gen > 0 { Decoder::bytes_of(spec, n_ctx as usize) } else { 0 };
        let scores = 8 * work.n_logits as u64;
        let workspace = if self.has_panels { WORKSPACE_BYTES } else { 0 };
        self.layout(n, work).n_bytes as u64 + ropes + step + scores + workspace + SMALL_BYTES
    }

    /// Lays a pass out as `Passes::plan` does; gate and up are taken for one matrix.
    fn layout(&self, n: usize, work: &Workload) -> Layout {
        let spec = self.spec;
        let (size, hidden, ffn) = (self.compute.size_bytes(), spec.hidden_size, spec.ffn_size);
        let (is_unseen, biases) = (!work.captures, &spec.block.biases);
        let adds = is_unseen && self.has_panels && !spec.block.out_norms && !biases.o && !biases.down;
        let is_quantized = |module: &str| {
            let config = self.recipe.quantization.as_ref();
            config.is_some_and(|config| config.scheme_for(module).is_some())
        };
        let linears = spec.linears();
        let is_plain = self.dtype == self.compute;
        let decodes = self.has_panels && (!is_plain || linears.iter().any(|(module, _)| is_quantized(module)));
        let is_gated = linears
            .iter()
            .filter(|(module, _)| module.contains(".gate_") || module.contains(".up_proj"))
            .all(|(module, _)| !is_plain || is_quantized(module));
        let is_gated = is_gated && self.has_panels && !biases.gate && !biases.up;
        let is_in_panels = is_unseen && n * 2 * ffn * size > GATED_BYTES && is_gated;
        let longest = hidden.max(spec.q_width()).max(ffn);
        let panel_bytes = match (decodes, is_in_panels && adds) {
            (false, _) => 0,
            (true, true) => (PANEL_ROWS * hidden * size).min(PANEL_BYTES).max(2 * longest * size),
            (true, false) => PANEL_BYTES.max(2 * longest * size),
        };
        let mlp = match is_in_panels {
            true => {
                let n_rows = panel_bytes / (2 * hidden * size);
                let gate_rows = if n_rows >= 64 { n_rows / 64 * 64 } else { n_rows }.clamp(1, ffn);
                Mlp::Panels { gate_rows, product_cols: if adds { (2 * gate_rows).min(ffn) } else { ffn } }
            }
            false => Mlp::Whole,
        };
        let rows = logit_rows(spec.vocab_size).min(work.n_logits.max(1));
        Layout::new(&Needs {
            n,
            size,
            hidden,
            q: spec.q_width(),
            kv: spec.kv_width(),
            ffn,
            has_deltas: !adds,
            mlp,
            panel_bytes,
            logit_bytes: 4 * spec.vocab_size * rows,
        })
    }
}
