//! The forward pass over whole sequences: an interpreter of the spec over buffers on the device.

use super::arena::{Arena, Layout, Mlp, Needs, part};
use super::cache::GpuCache;
use super::products::{GateRows, Panel, Products};
use super::rows::Rows;
use super::taps::{tap_columns, tap_projection};
use super::weights::{GpuBlock, GpuWeights, Projection};
use crate::engine::spec::{Activation, ModelSpec, NormRole};
use crate::engine::tap::{Source, Tap};
use crate::inference::InferenceError;
use crate::units::DType;
use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::ops::{Gate, STATE_POSITION};
use labpipe_kernels::cube::{self, Element, Residual};

/// Bytes of gate and up rows beyond which a pass computes them panel by panel.
pub const GATED_BYTES: usize = 32 << 20;

/// Returns the kernels' name for an activation.
pub fn gate(activation: Activation) -> Gate {
    match activation {
        Activation::Silu => Gate::Silu,
        Activation::Gelu => Gate::Gelu,
        Activation::GeluTanh => Gate::GeluTanh,
    }
}

/// A model on the device, ready for passes.
pub struct Passes {
    pub spec: ModelSpec,
    pub weights: GpuWeights,
    pub products: Products,
    pub compute: DType,
    pub arena: Arena,
}

/// How a pass goes, and the memory it takes.
#[derive(Clone)]
pub struct PassPlan {
    pub layout: Layout,
    mlp: Mlp,
    /// Products of sublayers are added to the residual stream, not written to a buffer.
    adds: bool,
}

/// What a pass leaves in the arena, until the next one.
pub struct Hidden {
    /// `[n, hidden]` in the activations' type, normed for the head.
    pub rows: Handle,
    /// Room for the logits that the plan was made for.
    pub logits: Handle,
    pub panel: Panel,
}

/// Buffers of one pass of `n` tokens, shaped as [`Layout`] says.
pub struct Buffers {
    pub n: usize,
    x: Handle,
    normed: Handle,
    pub qkv: Handle,
    delta: Handle,
    wide: Handle,
    product: Handle,
    panel: Panel,
    state: Handle, // position of the first token
    mlp: Mlp,
    adds: bool,
}

impl Passes {
    pub fn client(&self) -> &Client {
        &self.products.client
    }

    /// Plans a pass of `n` tokens; `is_unseen` where no tap is open, `logit_bytes` what is computed of its logits at a time.
    pub fn plan(&self, n: usize, is_unseen: bool, logit_bytes: usize) -> PassPlan {
        let (spec, products, blocks) = (&self.spec, &self.products, &self.weights.blocks);
        let (size, hidden, ffn) = (products.element.size_bytes(), spec.hidden_size, spec.ffn_size);
        let is_bare = |block: &GpuBlock| {
            let norms = [&block.attn_out_norm, &block.mlp_out_norm];
            norms.iter().all(|norm| norm.is_none()) && block.o.bias.is_none() && block.down.bias.is_none()
        };
        let adds = is_unseen && products.has_panels() && blocks.iter().all(is_bare);
        let is_decoded = |projection: &Projection| projection.parts.iter().any(|part| products.is_decoded(part));
        let is_gated = |block: &GpuBlock| {
            block.gate_up.parts.len() == 1 && is_decoded(&block.gate_up) && block.gate_up.bias.is_none()
        };
        // Panels mean more launches: short passes have no need of them.
        let is_large = n * 2 * ffn * size > GATED_BYTES || products.is_tested();
        let has_panels = is_unseen && is_large && blocks.iter().all(is_gated);
        let decodes = products.is_decoded(&self.weights.lm_head)
            || blocks
                .iter()
                .any(|block| [&block.qkv, &block.o, &block.gate_up, &block.down].into_iter().any(is_decoded));
        let panel_bytes = match decodes {
            true => products.panel_bytes(hidden, hidden.max(spec.q_width()).max(ffn), has_panels && adds),
            false => 0,
        };
        let mlp = match has_panels {
            true => products.mlp_panels(panel_bytes, hidden, ffn, adds),
            false => Mlp::Whole,
        };
        let layout = Layout::new(&Needs {
            n,
            size,
            hidden,
            q: spec.q_width(),
            kv: spec.kv_width(),
            ffn,
            has_deltas: !adds,
            mlp,
            panel_bytes,
            logit_bytes,
        });
        PassPlan { layout, mlp, adds }
    }

    /// Runs `tokens` behind those that the cache holds and returns the residual stream after the last block, normed for the head.
    ///
    /// # Errors
    /// `ContextTooLong`, `TokenOutOfRange`, the device's failures, and what `tap` returns.
    pub fn hidden_states(
        &mut self,
        tokens: &[u32],
        cache: &mut GpuCache,
        tap: &mut Tap<'_>,
        plan: &PassPlan,
    ) -> Result<Hidden, InferenceError> {
        let n = tokens.len();
        self.check(tokens, cache)?;
        let client = self.products.client.clone();
        for rope in &mut cache.ropes {
            rope.prepare(&client, cache.n_tokens + n);
        }
        let buffers = self.buffers(&client, n, cache.n_tokens, plan);
        let token_bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let tokens_device = client.create_from_slice(&token_bytes);
        let scale = self.spec.embedding_scale as f32;
        cube::embed(&client, &self.weights.embedding, &tokens_device, n, [0, n], scale, &buffers.x);
        let hidden = self.spec.hidden_size;
        tap.output("model.embed_tokens", None, "embedding", &self.rows(&client, &buffers.x, Element::F32, n, hidden))?;
        let mut delta: Option<(bool, usize)> = None;
        for layer_idx in 0..self.spec.n_layers {
            self.block(layer_idx, &buffers, cache, &mut delta, tap)?;
        }
        cache.n_tokens += n;
        let last = self.spec.n_layers.saturating_sub(1);
        self.step(&client, &buffers, delta.take(), Some(&self.weights.final_norm));
        if self.spec.n_layers > 0 && tap.wants(&format!("model.layers.{last}")) {
            let rows = self.rows(&client, &buffers.x, Element::F32, n, hidden);
            tap.output(&format!("model.layers.{last}"), Some(last), "block", &rows)?;
        }
        tap.output("model.norm", None, "norm", &self.rows(&client, &buffers.normed, self.products.element, n, hidden))?;
        let held = self.arena.get(&client, plan.layout.n_bytes);
        Ok(Hidden { rows: buffers.normed, logits: part(&held, &plan.layout.logits), panel: buffers.panel })
    }

    fn check(&self, tokens: &[u32], cache: &GpuCache) -> Result<(), InferenceError> {
        let asked = cache.n_tokens + tokens.len();
        if asked > cache.capacity {
            return Err(InferenceError::ContextTooLong { asked, n_ctx_max: cache.capacity });
        }
        let vocab_size = self.spec.vocab_size;
        match tokens.iter().find(|token| **token as usize >= vocab_size) {
            Some(&token) => Err(InferenceError::TokenOutOfRange { token, vocab_size }),
            None => Ok(()),
        }
    }

    fn buffers(&mut self, client: &Client, n: usize, n_past: usize, plan: &PassPlan) -> Buffers {
        let at = &plan.layout;
        let mut state = [0u8; 16];
        state[4 * STATE_POSITION as usize..][..4].copy_from_slice(&(n_past as u32).to_le_bytes());
        let held = self.arena.get(client, at.n_bytes);
        Buffers {
            n,
            x: part(&held, &at.x),
            normed: part(&held, &at.normed),
            qkv: part(&held, &at.qkv),
            delta: part(&held, &at.delta),
            wide: part(&held, &at.wide),
            product: part(&held, &at.product),
            panel: Panel { handle: part(&held, &at.panel), n_bytes: at.panel.len() },
            state: client.create_from_slice(&state),
            mlp: plan.mlp,
            adds: plan.adds,
        }
    }

    fn rows<'a>(&self, client: &'a Client, handle: &'a Handle, element: Element, n: usize, width: usize) -> Rows<'a> {
        Rows { client, handle, element, n, stride: width, first: 0, width }
    }

    /// Adds the output of the last sublayer (`delta`: whether it has a norm of its own, and its layer) and norms for the next.
    fn step(&self, client: &Client, buffers: &Buffers, delta: Option<(bool, usize)>, norm: Option<&Handle>) {
        let delta_norm = delta.and_then(|(is_mlp, layer_idx)| {
            let block = &self.weights.blocks[layer_idx];
            if is_mlp { block.mlp_out_norm.as_ref() } else { block.attn_out_norm.as_ref() }
        });
        let step = Residual {
            x: &buffers.x,
            delta: delta.map(|_| &buffers.delta),
            delta_norm,
            norm: norm.map(|norm| (norm, &buffers.normed)),
            eps: self.spec.block.norm_eps as f32,
        };
        cube::add_norm(client, self.products.element, &step, buffers.n, self.spec.hidden_size);
    }

    fn block(
        &mut self,
        layer_idx: usize,
        buffers: &Buffers,
        cache: &GpuCache,
        delta: &mut Option<(bool, usize)>,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        let client = self.products.client.clone();
        let (n, element, layer) = (buffers.n, self.products.element, Some(layer_idx));
        let hidden = self.spec.hidden_size;
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let attn_norm_name = name(self.spec.norm_name(NormRole::Attn));
        let mlp_norm_name = name(self.spec.norm_name(NormRole::Mlp));

        self.step(&client, buffers, delta.take(), Some(&self.weights.blocks[layer_idx].attn_norm));
        if layer_idx > 0 {
            let before = layer_idx - 1;
            let rows = self.rows(&client, &buffers.x, Element::F32, n, hidden);
            tap.output(&format!("model.layers.{before}"), Some(before), "block", &rows)?;
        }
        let normed = self.rows(&client, &buffers.normed, element, n, hidden);
        tap.output(&attn_norm_name, layer, "norm", &normed)?;
        let block = &self.weights.blocks[layer_idx];
        self.products.project(&buffers.normed, &block.qkv, &buffers.qkv, n, &buffers.panel)?;
        let names: &[&str] = if self.spec.block.fused_qkv {
            &["self_attn.qkv_proj"]
        } else {
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        };
        tap_projection(tap, layer_idx, names, &attn_norm_name, &normed, &block.qkv, &buffers.qkv)?;
        self.tap_head_norms(layer_idx, buffers, tap)?;
        let view = cache.layer(&self.spec, block, layer_idx);
        // The norm's rows are used by now, and so is what was projected once queries, keys and values have gone where they belong.
        let (queries, out) = (&buffers.normed, &buffers.qkv);
        cube::rope_append(&client, element, &view, &buffers.qkv, queries, &buffers.state, n);
        if cube::flash_fits(&client, element, &view) {
            cube::flash_attention(&client, element, &view, queries, out, &buffers.state, n);
        } else {
            cube::attention(&client, element, &view, queries, out, &buffers.state, n);
        }
        self.attention_out(layer_idx, buffers, delta, tap)?;

        self.step(&client, buffers, delta.take(), Some(&self.weights.blocks[layer_idx].mlp_norm));
        tap.output(&mlp_norm_name, layer, "norm", &normed)?;
        self.mlp(layer_idx, buffers, delta, &mlp_norm_name, tap)
    }

    /// Projects the attention output.
    fn attention_out(
        &mut self,
        layer_idx: usize,
        buffers: &Buffers,
        delta: &mut Option<(bool, usize)>,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        let (client, o) = (self.products.client.clone(), &self.weights.blocks[layer_idx].o);
        let (n, element, layer) = (buffers.n, self.products.element, Some(layer_idx));
        if buffers.adds {
            return self.products.project_add(&buffers.qkv, o, &buffers.x, n, &buffers.panel);
        }
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let attended = self.rows(&client, &buffers.qkv, element, n, self.spec.q_width());
        let (attn_name, o_name) = (name("self_attn.attn"), name("self_attn.o_proj"));
        tap.output(&attn_name, layer, "attn", &attended)?;
        tap.shared_input(&o_name, layer, "o_proj", &Source { module: &attn_name, op: "attn" }, &attended)?;
        self.products.project(&buffers.qkv, o, &buffers.delta, n, &buffers.panel)?;
        let out = self.rows(&client, &buffers.delta, element, n, self.spec.hidden_size);
        tap.output(&o_name, layer, "o_proj", &out)?;
        *delta = Some((false, layer_idx));
        self.tap_out_norm(layer_idx, NormRole::AttnOut, &out, tap)
    }

    fn mlp(
        &mut self,
        layer_idx: usize,
        buffers: &Buffers,
        delta: &mut Option<(bool, usize)>,
        mlp_norm_name: &str,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        match buffers.mlp {
            Mlp::Panels { gate_rows, product_cols } => {
                self.mlp_in_panels(layer_idx, buffers, gate_rows, product_cols)?;
                if buffers.adds {
                    return Ok(());
                }
            }
            Mlp::Whole => self.gate_up(layer_idx, buffers, mlp_norm_name, tap)?,
        }
        let (client, down) = (self.products.client.clone(), &self.weights.blocks[layer_idx].down);
        let (n, element, layer) = (buffers.n, self.products.element, Some(layer_idx));
        if buffers.adds {
            return self.products.project_add(&buffers.product, down, &buffers.x, n, &buffers.panel);
        }
        let name = format!("model.layers.{layer_idx}.mlp.down_proj");
        let product = self.rows(&client, &buffers.product, element, n, self.spec.ffn_size);
        tap.input(&name, layer, "down_proj", &product)?;
        self.products.project(&buffers.product, down, &buffers.delta, n, &buffers.panel)?;
        let out = self.rows(&client, &buffers.delta, element, n, self.spec.hidden_size);
        tap.output(&name, layer, "down_proj", &out)?;
        *delta = Some((true, layer_idx));
        self.tap_out_norm(layer_idx, NormRole::MlpOut, &out, tap)
    }

    /// Runs gate and up panel by panel; where products are added to the residual stream, down too, as soon as its columns are there.
    fn mlp_in_panels(
        &mut self,
        layer_idx: usize,
        buffers: &Buffers,
        gate_rows: usize,
        product_cols: usize,
    ) -> Result<(), InferenceError> {
        let block = &self.weights.blocks[layer_idx];
        let (n, ffn, act) = (buffers.n, self.spec.ffn_size, gate(self.spec.block.activation));
        let targets = [&buffers.wide, &buffers.product];
        for first in (0..ffn).step_by(product_cols) {
            let cols = first..(first + product_cols).min(ffn);
            let rows = GateRows { rows: cols.clone(), at_a_time: gate_rows };
            self.products.gated(&buffers.normed, &block.gate_up, act, &rows, targets, n, &buffers.panel)?;
            if buffers.adds {
                self.products.add_columns(&buffers.product, &block.down, &cols, &buffers.x, n, &buffers.panel)?;
            }
        }
        Ok(())
    }

    /// Runs the MLP up to its product of activated gate and up, all at once.
    fn gate_up(
        &mut self,
        layer_idx: usize,
        buffers: &Buffers,
        mlp_norm_name: &str,
        tap: &mut Tap<'_>,
    ) -> Result<(), InferenceError> {
        let client = self.products.client.clone();
        let (n, element) = (buffers.n, self.products.element);
        let (hidden, ffn) = (self.spec.hidden_size, self.spec.ffn_size);
        let name = |leaf: &str| format!("model.layers.{layer_idx}.{leaf}");
        let act = gate(self.spec.block.activation);
        let normed = self.rows(&client, &buffers.normed, element, n, hidden);
        let block = &self.weights.blocks[layer_idx];
        self.products.project(&buffers.normed, &block.gate_up, &buffers.wide, n, &buffers.panel)?;
        let names: &[&str] =
            if self.spec.block.fused_gate_up { &["mlp.gate_up_proj"] } else { &["mlp.gate_proj", "mlp.up_proj"] };
        tap_projection(tap, layer_idx, &names[..1], mlp_norm_name, &normed, &block.gate_up, &buffers.wide)?;
        if tap.wants(&name("mlp.act_fn")) {
            cube::gate(&client, element, act, false, &buffers.wide, &buffers.product, [n, ffn]);
            let activated = self.rows(&client, &buffers.product, element, n, ffn);
            tap.output(&name("mlp.act_fn"), Some(layer_idx), "act", &activated)?;
        }
        if names.len() > 1 {
            tap_columns(tap, layer_idx, names[1], mlp_norm_name, &normed, &buffers.wide, [ffn, ffn, 2 * ffn])?;
        }
        cube::gate(&client, element, act, true, &buffers.wide, &buffers.product, [n, ffn]);
        Ok(())
    }
}
