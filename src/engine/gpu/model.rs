//! The [`Model`] that stages see, on a GPU.

use super::cache::GpuCache;
use super::decode::{Decoder, synchronize};
use super::pass::Passes;
use super::room::Room;
use super::rows::{Rows, read};
use crate::engine::tap::Tap;
use crate::event::Progress;
use crate::inference::{
    CaptureFilter, CaptureSink, Decoded, InferenceError, Model, ModelInfo, Prefilled, TakeLogits, TokenScore, argmax,
    run_for_scores,
};
use cubecl::server::Handle;
use labpipe_kernels::cube::{self, Element};
use std::ops::Range;
use std::time::Instant;

/// Bytes of logits on the device at a time.
const LOGIT_BYTES: usize = 64 << 20;

/// A loaded model on a GPU.
pub struct GpuModel {
    info: ModelInfo,
    passes: Passes,
    cache: Option<GpuCache>,
    decoder: Option<Decoder>,
    room: Room,
    /// First token that `decode` will feed.
    next_token: Option<u32>,
}

impl GpuModel {
    pub fn new(info: ModelInfo, passes: Passes, room: Room) -> GpuModel {
        GpuModel { info, passes, cache: None, decoder: None, room, next_token: None }
    }

    /// Makes room for `n_ctx` tokens and empties the cache.
    fn emptied_cache(&mut self, n_ctx: usize) -> Result<(), InferenceError> {
        let n_ctx_max = self.passes.spec.n_ctx_max;
        if n_ctx > n_ctx_max {
            return Err(InferenceError::ContextTooLong { asked: n_ctx, n_ctx_max });
        }
        if self.cache.as_ref().is_none_or(|cache| cache.capacity < n_ctx) {
            // The old one goes first, and the recording that names its buffers.
            (self.decoder, self.cache) = (None, None);
            let asked_bytes = GpuCache::bytes_of(&self.passes.spec, self.passes.compute, n_ctx);
            self.room.check(&format!("a key-value cache of {n_ctx} tokens"), asked_bytes)?;
            let cache = GpuCache::new(self.passes.client(), &self.passes.spec, self.passes.compute, n_ctx);
            self.room.check_allocated(cache.handles())?;
            self.cache = Some(cache);
        }
        if let Some(cache) = &mut self.cache {
            cache.n_tokens = 0;
        }
        Ok(())
    }

    /// Runs `tokens` in an emptied cache and returns what the head reads.
    fn hidden_states(&mut self, tokens: &[u32], tap: &mut Tap<'_>) -> Result<Handle, InferenceError> {
        self.emptied_cache(tokens.len())?;
        let Some(cache) = self.cache.as_mut() else { unreachable!("it was just made") };
        self.passes.hidden_states(tokens, cache, tap)
    }

    /// Computes logits of rows `first..first + n`, `[n, vocab]` f32 on the device.
    fn logits(&mut self, hidden: &Handle, first: usize, n: usize, out: &Handle) -> Result<(), InferenceError> {
        let vocab = self.info.vocab_size;
        let Passes { products, weights, spec, .. } = &mut self.passes;
        products.logits(hidden, &weights.lm_head, out, [first, n])?;
        if let Some(cap) = spec.logit_softcap {
            cube::soft_cap(&products.client, out, n * vocab, cap as f32);
        }
        Ok(())
    }

    fn logit_rows(&self) -> usize {
        (LOGIT_BYTES / (4 * self.info.vocab_size)).clamp(1, 1024)
    }

    fn refuse_empty(tokens: &[u32], what: &str) -> Result<(), InferenceError> {
        if tokens.is_empty() {
            return Err(InferenceError::Unsupported(format!("{what} no tokens: at least one is needed")));
        }
        Ok(())
    }
}

impl Model for GpuModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn weights_bytes(&self) -> u64 {
        self.passes.weights.stored_bytes
    }

    fn kv_cache_bytes(&self) -> u64 {
        self.cache.as_ref().map_or(0, GpuCache::n_bytes)
    }

    fn reserve(&mut self, n_ctx: usize) -> Result<(), InferenceError> {
        let n_tokens = self.cache.as_ref().map_or(0, |cache| cache.n_tokens);
        let is_kept = self.cache.as_ref().is_some_and(|cache| cache.capacity >= n_ctx);
        self.emptied_cache(n_ctx)?;
        if let Some(cache) = self.cache.as_mut().filter(|_| is_kept) {
            cache.n_tokens = n_tokens;
        }
        Ok(())
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<Prefilled, InferenceError> {
        Self::refuse_empty(tokens, "prefill")?;
        self.emptied_cache(tokens.len())?;
        let vocab = self.info.vocab_size;
        let client = self.passes.client().clone();
        let out = client.empty(4 * vocab);
        synchronize(&client)?;
        let start = Instant::now();
        let hidden = self.hidden_states(tokens, &mut Tap::closed())?;
        self.logits(&hidden, tokens.len() - 1, 1, &out)?;
        synchronize(&client)?;
        let duration_s = start.elapsed().as_secs_f64();
        let logits = read(&client, &out, Element::F32, vocab)?;
        let next_token =
            argmax(&logits).ok_or_else(|| InferenceError::NotFiniteResult { what: "logits".to_owned() })?;
        self.next_token = Some(next_token);
        Ok(Prefilled { duration_s, next_token })
    }

    fn decode(&mut self, n_gen: usize) -> Result<Vec<Decoded>, InferenceError> {
        let (Some(token), Some(cache)) = (self.next_token, self.cache.as_mut()) else {
            return Err(InferenceError::Unsupported("decode before any prefill".to_owned()));
        };
        if cache.n_tokens + n_gen > cache.capacity {
            let (asked, n_ctx_max) = (cache.n_tokens + n_gen, cache.capacity);
            return Err(InferenceError::ContextTooLong { asked, n_ctx_max });
        }
        let passes = &self.passes;
        let decoder = self.decoder.get_or_insert_with(|| Decoder::new(passes, cache));
        let decoded = decoder.decode(passes, cache, token, n_gen);
        if decoded.is_err() {
            // Its buffers may never have been allocated: the next decode starts with new ones.
            self.decoder = None;
        }
        let decoded = decoded?;
        self.next_token = decoded.last().map_or(Some(token), |last| Some(last.token));
        Ok(decoded)
    }

    fn decode_clock(&self) -> Option<&'static str> {
        self.decoder.as_ref().filter(|decoder| decoder.is_timed_by_device()).map(|_| {
            "the device's own clock, read at the end of each step; all steps of a sequence are queued at once, and choosing the next \
             token is in them"
        })
    }

    /// Decodes twice from the same place: at once, as it is timed, then token by token for the logits.
    fn decode_keeping(&mut self, n_gen: usize, take: &mut TakeLogits<'_>) -> Result<Vec<Decoded>, InferenceError> {
        let (n_tokens, token) = (self.cache.as_ref().map_or(0, |cache| cache.n_tokens), self.next_token);
        let decoded = self.decode(n_gen)?;
        self.next_token = token;
        if let Some(cache) = &mut self.cache {
            cache.n_tokens = n_tokens;
        }
        let client = self.passes.client().clone();
        for _ in 0..n_gen {
            self.decode(1)?;
            if let Some(decoder) = &self.decoder {
                take(&read(&client, &decoder.logits, Element::F32, self.info.vocab_size)?)?;
            }
        }
        Ok(decoded)
    }

    fn last_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, InferenceError> {
        Self::refuse_empty(tokens, "run")?;
        let vocab = self.info.vocab_size;
        let client = self.passes.client().clone();
        let out = client.empty(4 * vocab);
        let hidden = self.hidden_states(tokens, &mut Tap::closed())?;
        self.logits(&hidden, tokens.len() - 1, 1, &out)?;
        read(&client, &out, Element::F32, vocab)
    }

    fn score(&mut self, tokens: &[u32], first_target: usize) -> Result<Vec<TokenScore>, InferenceError> {
        if first_target == 0 || first_target >= tokens.len() {
            return Err(InferenceError::Unsupported(format!(
                "score from token {first_target} of {}: the first token of a window has nothing before it",
                tokens.len()
            )));
        }
        let targets = &tokens[first_target..];
        let client = self.passes.client().clone();
        let hidden = self.hidden_states(run_for_scores(tokens, self.info.n_ctx_max), &mut Tap::closed())?;
        let (vocab, n) = (self.info.vocab_size, targets.len());
        let rows = self.logit_rows().min(n);
        let out = client.empty(4 * rows * vocab);
        let target_bytes: Vec<u8> = targets.iter().flat_map(|token| token.to_le_bytes()).collect();
        let targets_device = client.create_from_slice(&target_bytes);
        let (nll, choice) = (client.empty(4 * n), client.empty(4 * n));
        for first in (0..n).step_by(rows) {
            let chunk = rows.min(n - first);
            self.logits(&hidden, first_target - 1 + first, chunk, &out)?;
            cube::score(&client, &out, &targets_device, &nll, &choice, n, [first, chunk], vocab);
        }
        let nll = read(&client, &nll, Element::F32, n)?;
        let choice = client.read_one(choice).map_err(super::rows::device_error)?;
        let choices = choice.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let scores: Vec<TokenScore> =
            nll.iter().zip(choices).map(|(nll, argmax)| TokenScore { nll: f64::from(*nll), argmax }).collect();
        match scores.iter().all(|score| score.nll.is_finite()) {
            true => Ok(scores),
            false => Err(InferenceError::NotFiniteResult { what: "logits".to_owned() }),
        }
    }

    /// One pass, and the logits some rows at a time; the way of `score_keeping` and `score_against` until they pack and compare
    /// on the device.
    fn logits(&mut self, tokens: &[u32], rows: Range<usize>, take: &mut TakeLogits<'_>) -> Result<(), InferenceError> {
        let client = self.passes.client().clone();
        let hidden = self.hidden_states(tokens, &mut Tap::closed())?;
        let (vocab, n_rows) = (self.info.vocab_size, self.logit_rows().min(rows.len().max(1)));
        let out = client.empty(4 * n_rows * vocab);
        for first in rows.clone().step_by(n_rows) {
            let chunk = n_rows.min(rows.end - first);
            GpuModel::logits(self, &hidden, first, chunk, &out)?;
            take(&read(&client, &out, Element::F32, chunk * vocab)?)?;
        }
        Ok(())
    }

    fn capture(
        &mut self,
        tokens: &[u32],
        filter: &CaptureFilter,
        sink: &mut dyn CaptureSink,
        progress: &dyn Progress,
    ) -> Result<(), InferenceError> {
        let mut tap = Tap::open(filter, sink, progress)?;
        let hidden = self.hidden_states(tokens, &mut tap)?;
        if !tap.wants("lm_head") {
            return Ok(());
        }
        let (n, vocab) = (tokens.len(), self.info.vocab_size);
        let rows = self.logit_rows().min(n);
        let client = self.passes.client().clone();
        let out = client.empty(4 * rows * vocab);
        for first in (0..n).step_by(rows) {
            let chunk = rows.min(n - first);
            self.logits(&hidden, first, chunk, &out)?;
            tap.set_first_token(first);
            let (element, stride) = (Element::F32, vocab);
            let logits = Rows { client: &client, handle: &out, element, n: chunk, stride, first: 0, width: vocab };
            tap.output("lm_head", None, "lm_head", &logits)?;
        }
        Ok(())
    }
}
