//! The [`Model`] that stages see: a forward pass with its cache, its clock and its bookkeeping.

use super::footprint::{cache_bytes, pass_bytes};
use super::forward::Executor;
use super::host_decode::HostDecoder;
use super::kv_cache::KvCache;
use super::model_room::ModelRoom;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use super::score::scores_on_device;
use super::score::{LOGIT_ROWS, logits_in_chunks, values};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use super::step_decode::StepDecoder;
use super::tap::Tap;
use crate::artifact::Execution;
use crate::event::Progress;
use crate::inference::{
    CaptureFilter, CaptureSink, Decoded, InferenceError, Model, ModelInfo, Prefilled, TakeLogits, TokenScore, argmax,
    check_targets, run_for_scores, score_logits,
};
use std::ops::Range;
use std::time::Instant;

/// A loaded model on a burn device.
pub struct BurnModel {
    info: ModelInfo,
    executor: Executor,
    cache: Option<KvCache>,
    decoder: Decoder,
    /// First token that `decode` will feed.
    next_token: Option<u32>,
    room: ModelRoom,
    /// How it is run; what decodes is only known once a token was.
    execution: Execution,
    decodes_by_burn: bool,
}

/// Tokens of a context that are filled in at a time.
pub const FILLED_TOKENS: usize = 512;

/// How single tokens go through the model.
enum Decoder {
    /// Not settled: nothing was decoded yet.
    Unknown,
    Host(Box<HostDecoder>),
    /// Through the executor on a device, all of a sequence's tokens without asking the host.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    Step(Box<StepDecoder>),
    /// Through the executor, as prefill goes.
    Burn,
}

impl BurnModel {
    /// Takes a model whose weights are loaded. Single tokens go through plain slices where the weights are on the host and a step
    /// knows the model, unless it `decodes_by_burn`.
    pub fn new(
        info: ModelInfo,
        executor: Executor,
        room: ModelRoom,
        execution: Execution,
        decodes_by_burn: bool,
    ) -> BurnModel {
        let decoder = Decoder::Unknown;
        BurnModel { info, executor, cache: None, decoder, next_token: None, room, execution, decodes_by_burn }
    }

    fn ensure_cache(&mut self, n_ctx: usize) -> Result<(), InferenceError> {
        let spec = &self.executor.spec;
        if n_ctx > spec.n_ctx_max {
            return Err(InferenceError::ContextTooLong { asked: n_ctx, n_ctx_max: spec.n_ctx_max });
        }
        if self.cache.as_ref().is_none_or(|cache| cache.capacity() < n_ctx) {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            if let Decoder::Step(_) = self.decoder {
                // A recording names the old one's buffers.
                self.decoder = Decoder::Unknown;
            }
            self.cache = None;
            let asked_bytes = cache_bytes(spec, self.executor.compute, n_ctx);
            self.room.check(&format!("a key-value cache of {n_ctx} tokens"), asked_bytes)?;
            let width = spec.n_kv_heads * spec.head_dim;
            let cache = KvCache::new(spec.n_layers, n_ctx, width, self.executor.compute, &self.executor.device);
            self.cache = Some(cache);
        }
        Ok(())
    }

    /// Refuses a pass over `n` tokens, `n_rows` rows of whose logits are computed, where it does not fit the memory limit.
    fn check_pass(&self, n: usize, n_rows: usize) -> Result<(), InferenceError> {
        let asked_bytes = pass_bytes(&self.executor.spec, self.executor.compute, n, n, n_rows);
        self.room.check(&format!("the activations of {n} tokens"), asked_bytes)
    }

    /// Runs tokens behind the cache's and returns the last position's logits.
    fn step(&mut self, tokens: &[u32]) -> Result<Vec<f32>, InferenceError> {
        let hidden = self.executor.hidden_states(tokens, self.cache.as_mut(), &mut Tap::closed())?;
        let [n, width] = hidden.dims();
        let last = hidden.slice([n - 1..n, 0..width]);
        values(self.executor.logits(last)?)
    }

    /// Returns the token that is fed next, where the cache has room for `n_gen` more.
    fn decodable(&self, n_gen: usize) -> Result<u32, InferenceError> {
        let Some(token) = self.next_token else {
            return Err(InferenceError::Unsupported("decode before any prefill".to_owned()));
        };
        let (n_past, capacity) = self.cache.as_ref().map_or((0, 0), |cache| (cache.n_tokens(), cache.capacity()));
        if n_past + n_gen > capacity {
            return Err(InferenceError::ContextTooLong { asked: n_past + n_gen, n_ctx_max: capacity });
        }
        Ok(token)
    }

    /// Decides how single tokens go through the model, where that is still open.
    fn settle_decoder(&mut self) -> Result<(), InferenceError> {
        if !matches!(self.decoder, Decoder::Unknown) {
            return Ok(());
        }
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if let ModelRoom::Device(_) = self.room {
            // Rotary tables that follow the length are those of no step before.
            let follows_length = self.executor.spec.rope_depends_on_length();
            let capacity = self.cache.as_ref().map_or(0, KvCache::capacity);
            self.decoder = match follows_length {
                true => Decoder::Burn,
                false => Decoder::Step(Box::new(StepDecoder::new(&self.executor, capacity))),
            };
            self.execution.decode = Some("burn operations".to_owned());
            return Ok(());
        }
        let host = if self.decodes_by_burn { None } else { HostDecoder::new(&self.executor)?.ok() };
        self.execution.decode = Some(if host.is_some() { "host slices" } else { "burn operations" }.to_owned());
        self.decoder = host.map_or(Decoder::Burn, |host| Decoder::Host(Box::new(host)));
        Ok(())
    }

    /// Runs one token behind the cache's; returns its logits and what it took.
    fn timed_step(&mut self, token: u32) -> Result<(Vec<f32>, f64), InferenceError> {
        if let (Decoder::Host(host), Some(cache)) = (&mut self.decoder, &mut self.cache) {
            let n_past = cache.n_tokens();
            let layers = cache.host_layers()?;
            let start = Instant::now();
            let logits = host.step(&self.executor.spec, layers, n_past, token);
            let duration_s = start.elapsed().as_secs_f64();
            cache.advance(1);
            return Ok((logits.to_vec(), duration_s));
        }
        self.executor.synchronize()?;
        let start = Instant::now();
        let logits = self.step(&[token])?;
        self.executor.synchronize()?;
        let duration_s = start.elapsed().as_secs_f64();
        Ok((logits, duration_s))
    }
}

fn greedy(logits: &[f32]) -> Result<u32, InferenceError> {
    argmax(logits).ok_or_else(|| InferenceError::NotFiniteResult { what: "logits".to_owned() })
}

impl Model for BurnModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn weights_bytes(&self) -> u64 {
        self.executor.weights.stored_bytes
    }

    fn execution(&self) -> Option<Execution> {
        Some(self.execution.clone())
    }

    fn kv_cache_bytes(&self) -> u64 {
        self.cache.as_ref().map_or(0, KvCache::n_bytes)
    }

    fn release(&mut self) {
        (self.cache, self.decoder, self.next_token) = (None, Decoder::Unknown, None);
        self.execution.decode = None;
        self.room.tidy();
    }

    fn fill(&mut self, tokens: &[u32]) -> Result<(), InferenceError> {
        // Rotary frequencies that depend on the length are those of the whole context.
        let follows_length = self.executor.spec.rope_depends_on_length();
        if tokens.len() <= FILLED_TOKENS || follows_length {
            return self.prefill(tokens).map(|_| ());
        }
        self.ensure_cache(tokens.len())?;
        if let Some(cache) = &mut self.cache {
            cache.clear(&self.executor.device);
        }
        let mut logits = Vec::new();
        for chunk in tokens.chunks(FILLED_TOKENS) {
            logits = self.step(chunk)?;
        }
        self.next_token = Some(greedy(&logits)?);
        Ok(())
    }

    fn reserve(&mut self, n_ctx: usize) -> Result<(), InferenceError> {
        self.ensure_cache(n_ctx)
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<Prefilled, InferenceError> {
        if tokens.is_empty() {
            return Err(InferenceError::Unsupported("prefill no tokens: at least one is needed".to_owned()));
        }
        self.ensure_cache(tokens.len())?;
        self.check_pass(tokens.len(), 1)?;
        if let Some(cache) = &mut self.cache {
            cache.clear(&self.executor.device);
        }
        self.executor.synchronize()?;
        let start = Instant::now();
        let logits = self.step(tokens)?;
        self.executor.synchronize()?;
        let duration_s = start.elapsed().as_secs_f64();
        let next_token = greedy(&logits)?;
        self.next_token = Some(next_token);
        Ok(Prefilled { duration_s, next_token })
    }

    fn decode(&mut self, n_gen: usize) -> Result<Vec<Decoded>, InferenceError> {
        let token = self.decodable(n_gen)?;
        self.settle_decoder()?;
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if let (Decoder::Step(step), Some(cache)) = (&mut self.decoder, &mut self.cache) {
            let decoded = step.decode(&self.executor, cache, token, n_gen);
            let how = if step.unrecorded().is_some() { "launched one by one" } else { "recorded" };
            self.execution.decode = Some(how.to_owned());
            let can_record = matches!(&self.room, ModelRoom::Device(room) if room.records_launches());
            let refused = step.unrecorded().filter(|_| can_record).map(str::to_owned);
            self.execution.slow.extend(refused.filter(|reason| !self.execution.slow.contains(reason)));
            if decoded.is_err() {
                // Its buffers may never have been allocated: the next decode starts with new ones.
                self.decoder = Decoder::Unknown;
            }
            let decoded = decoded?;
            self.next_token = decoded.last().map_or(Some(token), |last| Some(last.token));
            return Ok(decoded);
        }
        let _ = token;
        self.decode_keeping(n_gen, &mut |_| Ok(()))
    }

    fn decode_keeping(&mut self, n_gen: usize, take: &mut TakeLogits<'_>) -> Result<Vec<Decoded>, InferenceError> {
        let mut token = self.decodable(n_gen)?;
        self.settle_decoder()?;
        let mut decoded = Vec::with_capacity(n_gen);
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if matches!(self.decoder, Decoder::Step(_)) {
            for _ in 0..n_gen {
                decoded.extend(self.decode(1)?);
                if let Decoder::Step(step) = &self.decoder {
                    take(&step.logits()?)?;
                }
            }
            return Ok(decoded);
        }
        for _ in 0..n_gen {
            let (logits, duration_s) = self.timed_step(token)?;
            token = greedy(&logits)?;
            decoded.push(Decoded { token, duration_s });
            take(&logits)?;
        }
        self.next_token = Some(token);
        Ok(decoded)
    }

    fn last_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, InferenceError> {
        self.check_pass(tokens.len(), 1)?;
        let hidden = self.executor.hidden_states(tokens, None, &mut Tap::closed())?;
        let [n, width] = hidden.dims();
        values(self.executor.logits(hidden.slice([n - 1..n, 0..width]))?)
    }

    fn score(&mut self, tokens: &[u32], first_target: usize) -> Result<Vec<TokenScore>, InferenceError> {
        check_targets(tokens, first_target)?;
        let (vocab_size, run) = (self.info.vocab_size, run_for_scores(tokens, self.info.n_ctx_max));
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        if let ModelRoom::Device(_) = self.room {
            self.check_pass(run.len(), tokens.len() - first_target)?;
            return scores_on_device(&self.executor, run, &tokens[first_target..], first_target - 1);
        }
        let mut scores: Vec<TokenScore> = Vec::with_capacity(tokens.len() - first_target);
        self.logits(run, first_target - 1..tokens.len() - 1, &mut |logits| {
            let first = first_target + scores.len();
            scores.extend(score_logits(logits, vocab_size, &tokens[first..first + logits.len() / vocab_size])?);
            Ok(())
        })?;
        Ok(scores)
    }

    fn logits(&mut self, tokens: &[u32], rows: Range<usize>, take: &mut TakeLogits<'_>) -> Result<(), InferenceError> {
        self.check_pass(tokens.len(), rows.len())?;
        logits_in_chunks(&self.executor, tokens, rows, take)
    }

    fn capture(
        &mut self,
        tokens: &[u32],
        filter: &CaptureFilter,
        sink: &mut dyn CaptureSink,
        progress: &dyn Progress,
    ) -> Result<(), InferenceError> {
        self.check_pass(tokens.len(), tokens.len())?;
        let mut tap = Tap::open(filter, sink, progress)?;
        let hidden = self.executor.hidden_states(tokens, None, &mut tap)?;
        if !tap.wants("lm_head") {
            return Ok(());
        }
        let [n, width] = hidden.dims();
        for first in (0..n).step_by(LOGIT_ROWS) {
            let rows = hidden.clone().slice([first..(first + LOGIT_ROWS).min(n), 0..width]);
            tap.set_first_token(first);
            tap.output("lm_head", None, "lm_head", &self.executor.head(rows)?)?;
        }
        Ok(())
    }
}
