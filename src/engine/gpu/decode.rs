//! Decoding one token after another: a step recorded once as a graph and replayed, its position and token kept on the device.
//!
//! Activations of a single token are fp32 throughout. Where a matrix fits the tensor-core kernels, a block is five launches: norm and
//! query-key-value projection, rotation and cache, attention, output projection and residual sum, and likewise two for the MLP.
//! Elsewhere the same steps run unfused.

use super::cache::GpuCache;
use super::pass::{Passes, gate};
use super::rows::device_error;
use super::weights::{GpuBlock, Projection};
use crate::engine::spec::{Activation, ModelSpec};
use crate::inference::{Decoded, InferenceError};
use crate::units::DType;
use cubecl::client::{Client, Graph};
use cubecl::server::Handle;
use labpipe_kernels::cube::gemv::Epilogue;
use labpipe_kernels::cube::ops::{STATE_HISTORY, STATE_POSITION, STATE_TOKEN};
use labpipe_kernels::cube::{
    self, ChooseScratch, DecodeScratch, Element, Gemv, Norm, NotTaken, Place, Residual, Tuning,
};
use std::time::Instant;

/// The buffers of a step and its recording.
pub struct Decoder {
    x: Handle,
    normed: Handle,
    qkv: Handle,
    q: Handle,
    attn: Handle,
    delta: Handle,
    gate_up: Handle,
    product: Handle,
    pub logits: Handle,
    state: Handle,
    /// For each layer, what the attention of one launch needs; nothing where the layer takes the generic kernels.
    scratches: Vec<Option<DecodeScratch>>,
    choice: ChooseScratch,
    /// When each step ended, by the device's clock, where it has one.
    clock: Option<Handle>,
    /// Words of the state: position, token, and as many chosen tokens as the cache has room for.
    n_state: usize,
    /// A step, recorded; why it is not.
    graph: Result<Graph, NotTaken>,
    /// How many of its launches overlap; why none does.
    overlapped: Result<usize, NotTaken>,
}

impl Decoder {
    /// Returns the bytes of a step's buffers, the scratch of attention apart.
    pub fn bytes_of(spec: &ModelSpec, capacity: usize) -> u64 {
        let activations =
            3 * spec.hidden_size + 3 * spec.q_width() + 2 * spec.kv_width() + 3 * spec.ffn_size + spec.vocab_size;
        let n_state = STATE_HISTORY as usize + capacity + 2;
        (4 * activations + 12 * n_state) as u64
    }

    pub fn new(passes: &Passes, cache: &GpuCache) -> Decoder {
        let (client, spec) = (passes.client(), &passes.spec);
        let floats = |n: usize| client.empty(4 * n);
        let n_state = STATE_HISTORY as usize + 1 + cache.capacity + 1;
        // Layers run one after the other: those with heads alike share their scratch.
        let mut scratch: Option<DecodeScratch> = None;
        let scratches = (0..spec.n_layers)
            .map(|layer_idx| {
                let view = cache.layer(spec, &passes.weights.blocks[layer_idx], layer_idx);
                if !scratch.as_ref().is_some_and(|scratch| scratch.fits(&view)) {
                    scratch = DecodeScratch::new(client, &view);
                }
                scratch.clone()
            })
            .collect();
        Decoder {
            scratches,
            x: floats(spec.hidden_size),
            normed: floats(spec.hidden_size),
            qkv: floats(spec.q_width() + 2 * spec.kv_width()),
            q: floats(spec.q_width()),
            attn: floats(spec.q_width()),
            delta: floats(spec.hidden_size),
            gate_up: floats(2 * spec.ffn_size),
            product: floats(spec.ffn_size),
            logits: floats(spec.vocab_size),
            state: client.create_from_slice(&vec![0u8; 4 * n_state]),
            choice: ChooseScratch::new(client, spec.vocab_size),
            clock: cube::has_clock(client).then(|| client.empty(8 * n_state)),
            n_state,
            graph: Err(NotTaken::Untried),
            overlapped: Err(NotTaken::Untried),
        }
    }

    /// Generates `n_gen` tokens greedily after those in the cache, the first of them following `token`.
    ///
    /// # Errors
    /// The device's failures; `NotFiniteResult` where a step's logits are not numbers.
    pub fn decode(
        &mut self,
        passes: &Passes,
        cache: &mut GpuCache,
        token: u32,
        n_gen: usize,
    ) -> Result<Vec<Decoded>, InferenceError> {
        let client = passes.client().clone();
        if n_gen == 0 {
            return Ok(Vec::new());
        }
        let follows_length = cache.ropes.iter().any(super::rope::RopeTable::depends_on_length);
        if matches!(self.graph, Err(NotTaken::Untried)) && !follows_length {
            self.set_state(&client, cache.n_tokens, token);
            self.record(passes, cache)?;
        }
        self.set_state(&client, cache.n_tokens, token);
        synchronize(&client)?;
        let durations = match &self.clock {
            Some(clock) if self.graph.is_ok() => self.replay(&client, clock, n_gen)?,
            _ => self.step_by_step(passes, cache, n_gen)?,
        };
        cache.n_tokens += n_gen;
        self.check_logits(&client, passes.spec.vocab_size)?;
        let words = read_words(&client, &self.state)?;
        let chosen = &words[STATE_HISTORY as usize + 1..][..n_gen];
        Ok(chosen.iter().zip(durations).map(|(&token, duration_s)| Decoded { token, duration_s }).collect())
    }

    /// Queues all steps, which need nothing of the host, and returns how long each took by the device's clock.
    fn replay(&self, client: &Client, clock: &Handle, n_gen: usize) -> Result<Vec<f64>, InferenceError> {
        cube::stamp(client, clock, 2 * self.n_state);
        for _ in 0..n_gen {
            if let Ok(graph) = &self.graph {
                // SAFETY: the buffers of all recorded launches live as long as `self`, the cache and the weights;
                // replacing one of them makes a new decoder.
                unsafe { graph.replay() }.map_err(device_error)?;
            }
        }
        synchronize(client)?;
        let words = read_words(client, clock)?;
        let readings: Vec<u64> =
            words[..2 * (n_gen + 1)].chunks_exact(2).map(|w| u64::from(w[0]) | u64::from(w[1]) << 32).collect();
        Ok(readings.windows(2).map(|pair| pair[1].saturating_sub(pair[0]) as f64 * 1e-9).collect())
    }

    /// Runs steps one by one, each timed by the host around an idle device.
    fn step_by_step(&self, passes: &Passes, cache: &mut GpuCache, n_gen: usize) -> Result<Vec<f64>, InferenceError> {
        let client = passes.client();
        let follows_length = cache.ropes.iter().any(super::rope::RopeTable::depends_on_length);
        let mut durations = Vec::with_capacity(n_gen);
        for i in 0..n_gen {
            if follows_length {
                for rope in &mut cache.ropes {
                    rope.prepare(client, cache.n_tokens + i + 1);
                }
                synchronize(client)?;
            }
            let start = Instant::now();
            match &self.graph {
                // SAFETY: as above.
                Ok(graph) => unsafe { graph.replay() }.map_err(device_error)?,
                Err(_) => self.step(passes, cache),
            }
            synchronize(client)?;
            durations.push(start.elapsed().as_secs_f64());
        }
        Ok(durations)
    }

    /// Returns true where steps are timed by the device's clock: for records.
    pub fn is_timed_by_device(&self) -> bool {
        self.clock.is_some() && self.graph.is_ok()
    }

    /// Returns whether steps are recorded, and how many of their launches overlap; why not.
    pub fn recorded(&self) -> (Result<(), NotTaken>, Result<usize, NotTaken>) {
        (self.graph.as_ref().map(|_| ()).map_err(Clone::clone), self.overlapped.clone())
    }

    fn check_logits(&self, client: &Client, vocab_size: usize) -> Result<(), InferenceError> {
        let logits = super::rows::read(client, &self.logits, Element::F32, vocab_size)?;
        match logits.iter().find(|logit| !logit.is_finite()) {
            None => Ok(()),
            Some(_) => Err(InferenceError::NotFiniteResult { what: "logits of a decoded token".to_owned() }),
        }
    }

    fn set_state(&self, client: &Client, position: usize, token: u32) {
        let mut words = vec![0u32; self.n_state];
        words[STATE_POSITION as usize] = position as u32;
        words[STATE_TOKEN as usize] = token;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        client.write(&self.state, cubecl::bytes::Bytes::from_bytes_vec(bytes));
    }

    /// Records a step; where the device can't, steps are launched one by one.
    fn record(&mut self, passes: &Passes, cache: &GpuCache) -> Result<(), InferenceError> {
        let client = passes.client();
        if let Err(error) = client.graph_prepare() {
            (self.graph, self.overlapped) = (Err(NotTaken::failed(&error)), Err(NotTaken::failed(&error)));
            return Ok(());
        }
        // Compiles every kernel and writes only what the first step writes again.
        self.step(passes, cache);
        synchronize(client)?;
        let overlapping = cube::overlap::support(client).and_then(|()| self.recording(passes, cache, true));
        (self.graph, self.overlapped) = match overlapping {
            Ok((graph, n_early)) => (Ok(graph), Ok(n_early)),
            Err(why) => (self.recording(passes, cache, false).map(|(graph, _)| graph), Err(why)),
        };
        Ok(())
    }

    /// Returns the recording of a step, and how many of its launches begin early, which they do where they are to `overlap`.
    fn recording(&self, passes: &Passes, cache: &GpuCache, overlap: bool) -> Result<(Graph, usize), NotTaken> {
        let client = passes.client();
        client.start_capture().map_err(NotTaken::failed)?;
        self.step(passes, cache);
        let n_early = if overlap { cube::overlap::overlap(client) } else { Ok(0) };
        // A capture that was begun ends, also where its graph is of no use.
        let graph = client.stop_capture().map_err(NotTaken::failed)?;
        Ok((graph, n_early?))
    }

    /// Launches everything between a token and the next.
    fn step(&self, passes: &Passes, cache: &GpuCache) {
        let (client, spec, weights) = (passes.client(), &passes.spec, &passes.weights);
        let scale = spec.embedding_scale as f32;
        let token_at = [STATE_TOKEN as usize, 1];
        cube::embed(client, &weights.embedding, &self.state, self.n_state, token_at, scale, &self.x);
        for (layer_idx, block) in weights.blocks.iter().enumerate() {
            self.attention(passes, cache, layer_idx, block);
            self.mlp(passes, block);
        }
        let eps = spec.block.norm_eps as f32;
        let head = &weights.lm_head;
        if passes.compute != DType::F32 && cube::gemv_fits(client, head, 1, false) {
            let norm = Some(Norm { weight: &weights.final_norm, eps });
            let call = Gemv { x: &self.x, y: &self.logits, m: 1, norm, bias: None, epilogue: Epilogue::Store };
            cube::gemv(client, head, &call, Tuning::of(head));
        } else {
            self.norm(passes, &weights.final_norm);
            cube::linear(client, head, [Element::F32; 2], &self.normed, None, &self.logits, Place::whole(head), 1);
        }
        if let Some(cap) = spec.logit_softcap {
            cube::soft_cap(client, &self.logits, spec.vocab_size, cap as f32);
        }
        let (logits, state) = ((&self.logits, spec.vocab_size), (&self.state, self.n_state));
        cube::choose(client, logits, state, self.clock.as_ref(), &self.choice);
    }

    fn attention(&self, passes: &Passes, cache: &GpuCache, layer_idx: usize, block: &GpuBlock) {
        let client = passes.client();
        let view = cache.layer(&passes.spec, block, layer_idx);
        self.project(passes, &self.x, Some(&block.attn_norm), &block.qkv, &self.qkv, Epilogue::Store);
        match &self.scratches[layer_idx] {
            Some(scratch) => cube::decode_attention(client, &view, scratch, &self.qkv, &self.attn, &self.state),
            None => {
                cube::rope_append(client, Element::F32, &view, &self.qkv, &self.q, &self.state, 1);
                cube::attention(client, Element::F32, &view, &self.q, &self.attn, &self.state, 1);
            }
        }
        self.add(passes, &self.attn, &block.o, block.attn_out_norm.as_ref());
    }

    fn mlp(&self, passes: &Passes, block: &GpuBlock) {
        let epilogue = match passes.spec.block.activation {
            Activation::Silu => Epilogue::SiluMul,
            Activation::GeluTanh => Epilogue::GeluMul,
            // Exact GELU has no fused form.
            Activation::Gelu => Epilogue::Store,
        };
        let out = if epilogue == Epilogue::Store { &self.gate_up } else { &self.product };
        self.project(passes, &self.x, Some(&block.mlp_norm), &block.gate_up, out, epilogue);
        if epilogue == Epilogue::Store {
            self.gate(passes);
        }
        self.add(passes, &self.product, &block.down, block.mlp_out_norm.as_ref());
    }

    fn gate(&self, passes: &Passes) {
        let act = gate(passes.spec.block.activation);
        let shape = [1, passes.spec.ffn_size];
        cube::gate(passes.client(), Element::F32, act, true, &self.gate_up, &self.product, shape);
    }

    fn norm(&self, passes: &Passes, weight: &Handle) {
        let norm = Some((weight, &self.normed));
        let eps = passes.spec.block.norm_eps as f32;
        let step = Residual { x: &self.x, delta: None, delta_norm: None, norm, eps };
        cube::add_norm(passes.client(), Element::F32, &step, 1, passes.spec.hidden_size);
    }

    /// Adds a projection to the residual stream, through a norm of its own where the model has one.
    fn add(&self, passes: &Passes, input: &Handle, projection: &Projection, out_norm: Option<&Handle>) {
        if out_norm.is_none() && self.fits(passes, projection, false).is_some() {
            return self.project(passes, input, None, projection, &self.x, Epilogue::Add);
        }
        self.project(passes, input, None, projection, &self.delta, Epilogue::Store);
        let eps = passes.spec.block.norm_eps as f32;
        let step = Residual { x: &self.x, delta: Some(&self.delta), delta_norm: out_norm, norm: None, eps };
        cube::add_norm(passes.client(), Element::F32, &step, 1, passes.spec.hidden_size);
    }

    /// Returns the one matrix that the tensor-core kernel would take for a projection.
    fn fits<'a>(
        &self,
        passes: &Passes,
        projection: &'a Projection,
        paired: bool,
    ) -> Option<&'a labpipe_kernels::cube::DeviceMatrix> {
        match projection.parts.as_slice() {
            [matrix] if passes.compute != DType::F32 && cube::gemv_fits(passes.client(), matrix, 1, paired) => {
                Some(matrix)
            }
            _ => None,
        }
    }

    /// Writes `epilogue(W · norm(input) + b)`.
    fn project(
        &self,
        passes: &Passes,
        input: &Handle,
        norm: Option<&Handle>,
        projection: &Projection,
        out: &Handle,
        epilogue: Epilogue,
    ) {
        let client = passes.client();
        let eps = passes.spec.block.norm_eps as f32;
        let paired = matches!(epilogue, Epilogue::SiluMul | Epilogue::GeluMul);
        if let Some(matrix) = self.fits(passes, projection, paired) {
            let norm = norm.map(|weight| Norm { weight, eps });
            let call = Gemv { x: input, y: out, m: 1, norm, bias: projection.bias.as_ref(), epilogue };
            return cube::gemv(client, matrix, &call, Tuning::of(matrix));
        }
        let x = match norm {
            None => input,
            Some(weight) => {
                self.norm(passes, weight);
                &self.normed
            }
        };
        let target = if paired { &self.gate_up } else { out };
        let mut y_first = 0;
        for part in &projection.parts {
            let place = Place { x_row: 0, y_first, y_stride: projection.n_out };
            cube::linear(client, part, [Element::F32; 2], x, None, target, place, 1);
            y_first += part.n_rows;
        }
        if let Some(bias) = &projection.bias {
            cube::add_bias(client, Element::F32, target, bias, 1, projection.n_out);
        }
        if paired {
            self.gate(passes);
        }
    }
}

fn read_words(client: &Client, handle: &Handle) -> Result<Vec<u32>, InferenceError> {
    let bytes = client.read_one(handle.clone()).map_err(device_error)?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// Waits until the device is idle.
///
/// # Errors
/// `Device` where it has failed.
pub fn synchronize(client: &Client) -> Result<(), InferenceError> {
    cubecl::future::block_on(client.sync()).map_err(device_error)
}
