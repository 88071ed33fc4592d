//! The [`Model`] that stages see, on a GPU.

use super::cache::GpuCache;
use super::decode::{Decoder, synchronize};
use super::pass::{Hidden, PassPlan, Passes};
use super::room::Room;
use super::rows::{Rows, device_error, floats, read};
use crate::artifact::Execution;
use crate::engine::tap::Tap;
use crate::event::Progress;
use crate::inference::{
    CaptureFilter, CaptureSink, Decoded, InferenceError, Model, ModelInfo, Prefilled, TakeLogits, TokenScore, argmax,
    check_targets, run_for_scores,
};
use labpipe_kernels::cube::{self, Element, NotTaken, Paths};
use std::ops::Range;
use std::time::Instant;

/// Bytes of logits on the device at a time. They lie where the pass had its own buffers; the head is read once for each.
const LOGIT_BYTES: usize = 48 << 20;

/// Tokens of a context that are filled in at a time: what their activations take matters beside a long cache.
pub const FILLED_TOKENS: usize = 512;

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

    /// Returns which of the device's fast ways passes and steps take, as far as was tried.
    pub fn paths(&self) -> Paths {
        let untried = (Err(NotTaken::Untried), Err(NotTaken::Untried));
        let (recorded, overlapped) = self.decoder.as_ref().map_or(untried, Decoder::recorded);
        Paths { cublas: self.passes.products.cublas(), recorded, overlapped }
    }

    /// Makes room for `n_ctx` tokens and empties the cache.
    fn emptied_cache(&mut self, n_ctx: usize) -> Result<(), InferenceError> {
        let n_ctx_max = self.passes.spec.n_ctx_max;
        if n_ctx > n_ctx_max {
            return Err(InferenceError::ContextTooLong { asked: n_ctx, n_ctx_max });
        }
        if self.cache.as_ref().is_none_or(|cache| cache.capacity < n_ctx) {
            // The old one goes first, the recording that names its buffers, and what passes over shorter contexts needed.
            (self.decoder, self.cache) = (None, None);
            self.passes.arena.release();
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

    /// Makes room for a pass of `n_tokens`, in an emptied cache, and for `n_rows` rows of its logits at a time.
    fn prepare(&mut self, n_tokens: usize, is_unseen: bool, n_rows: usize) -> Result<PassPlan, InferenceError> {
        self.emptied_cache(n_tokens)?;
        self.planned(n_tokens, is_unseen, n_rows)
    }

    /// Makes room for a pass of `n_tokens` behind those in the cache.
    fn planned(&mut self, n_tokens: usize, is_unseen: bool, n_rows: usize) -> Result<PassPlan, InferenceError> {
        let plan = self.passes.plan(n_tokens, is_unseen, 4 * self.info.vocab_size * n_rows);
        let n_bytes = plan.layout.n_bytes;
        if !self.passes.arena.holds(n_bytes) {
            self.passes.arena.release();
            self.room.check(&format!("the activations of {n_tokens} tokens"), n_bytes as u64)?;
            let client = self.passes.client().clone();
            let held = self.passes.arena.get(&client, n_bytes);
            self.settled(|model| model.room.check_allocated(std::iter::once(&held)))?;
        }
        Ok(plan)
    }

    /// Runs `tokens` in the cache and the memory that were prepared.
    fn pass(&mut self, tokens: &[u32], tap: &mut Tap<'_>, plan: &PassPlan) -> Result<Hidden, InferenceError> {
        let Some(cache) = self.cache.as_mut() else { unreachable!("`prepare` made it") };
        self.passes.hidden_states(tokens, cache, tap, plan)
    }

    /// Gives the memory of passes back where `run` fails: cubecl keeps a failure on what it left unwritten, and the next pass
    /// would find it there.
    fn settled<T>(
        &mut self,
        run: impl FnOnce(&mut GpuModel) -> Result<T, InferenceError>,
    ) -> Result<T, InferenceError> {
        let result = run(self);
        if result.is_err() {
            self.passes.arena.release();
        }
        result
    }

    /// Computes the output of the module `lm_head` for rows `first..first + n`, `[n, vocab]` f32, where the pass left room for it: logits
    /// before their soft cap, where the model has one.
    fn head(&mut self, hidden: &Hidden, [first, n]: [usize; 2]) -> Result<(), InferenceError> {
        let Passes { products, weights, .. } = &mut self.passes;
        products.logits(&hidden.rows, &weights.lm_head, &hidden.logits, [first, n], &hidden.panel)
    }

    /// Computes logits as [`head`](Self::head) does, soft-capped.
    fn capped_logits(&mut self, hidden: &Hidden, [first, n]: [usize; 2]) -> Result<(), InferenceError> {
        self.head(hidden, [first, n])?;
        if let Some(cap) = self.passes.spec.logit_softcap {
            let n_values = n * self.info.vocab_size;
            cube::soft_cap(&self.passes.products.client, &hidden.logits, n_values, cap as f32);
        }
        Ok(())
    }

    /// Returns how many of `n` rows of logits there are at a time.
    fn logit_rows(&self, n: usize) -> usize {
        logit_rows(self.info.vocab_size).min(n.max(1))
    }

    /// Scores `targets`, the first of which row `first_row` of the pass predicts.
    fn scores(
        &mut self,
        hidden: &Hidden,
        targets: &[u32],
        first_row: usize,
    ) -> Result<Vec<TokenScore>, InferenceError> {
        let (vocab, n, client) = (self.info.vocab_size, targets.len(), self.passes.client().clone());
        let rows = self.logit_rows(n);
        let target_bytes: Vec<u8> = targets.iter().flat_map(|token| token.to_le_bytes()).collect();
        let targets_device = client.create_from_slice(&target_bytes);
        let (nll, choice) = (client.empty(4 * n), client.empty(4 * n));
        for first in (0..n).step_by(rows) {
            let chunk = rows.min(n - first);
            self.capped_logits(hidden, [first_row + first, chunk])?;
            cube::score(&client, &hidden.logits, &targets_device, &nll, &choice, n, [first, chunk], vocab);
        }
        let bytes = client.read(vec![nll, choice]).map_err(device_error)?;
        let choices = bytes[1].chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let nll = floats(&bytes[0], Element::F32);
        Ok(nll.iter().zip(choices).map(|(nll, argmax)| TokenScore { nll: f64::from(*nll), argmax }).collect())
    }

    /// Fills the emptied cache `n_at_once` tokens at a time.
    pub fn fill_by(&mut self, tokens: &[u32], n_at_once: usize) -> Result<(), InferenceError> {
        // Rotary frequencies that depend on the length are those of the whole context.
        let follows_length = self.passes.spec.rope_depends_on_length();
        if tokens.len() <= n_at_once || follows_length {
            return self.prefill(tokens).map(|_| ());
        }
        self.emptied_cache(tokens.len())?;
        let client = self.passes.client().clone();
        let mut logits = Vec::new();
        for chunk in tokens.chunks(n_at_once) {
            let plan = self.planned(chunk.len(), true, 1)?;
            logits = self.settled(|model| {
                let hidden = model.pass(chunk, &mut Tap::closed(), &plan)?;
                model.capped_logits(&hidden, [chunk.len() - 1, 1])?;
                read(&client, &hidden.logits, Element::F32, model.info.vocab_size)
            })?;
        }
        let next_token = argmax(&logits);
        self.next_token =
            Some(next_token.ok_or_else(|| InferenceError::NotFiniteResult { what: "logits".to_owned() })?);
        Ok(())
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

    fn execution(&self) -> Option<Execution> {
        let paths = self.paths();
        let decode = match (&paths.recorded, &paths.overlapped) {
            (Err(NotTaken::Untried), _) => None,
            (Ok(()), Ok(_)) => Some("recorded, overlapped"),
            (Ok(()), Err(_)) => Some("recorded"),
            (Err(_), _) => Some("launched one by one"),
        };
        Some(Execution {
            path: "fused".to_owned(),
            fallback: None,
            products: Some(
                paths.cublas.as_ref().map_or("cubecl kernels".to_owned(), |version| format!("cuBLAS {version}")),
            ),
            decode: decode.map(str::to_owned),
            slow: paths.warnings(),
        })
    }

    fn kv_cache_bytes(&self) -> u64 {
        self.cache.as_ref().map_or(0, GpuCache::n_bytes)
    }

    fn release(&mut self) {
        // The recording names the other two's buffers.
        self.decoder = None;
        (self.cache, self.next_token) = (None, None);
        self.passes.arena.release();
    }

    fn fill(&mut self, tokens: &[u32]) -> Result<(), InferenceError> {
        self.fill_by(tokens, FILLED_TOKENS)
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
        let plan = self.prepare(tokens.len(), true, 1)?;
        let client = self.passes.client().clone();
        let (duration_s, logits) = self.settled(|model| {
            synchronize(&client)?;
            let start = Instant::now();
            let hidden = model.pass(tokens, &mut Tap::closed(), &plan)?;
            model.capped_logits(&hidden, [tokens.len() - 1, 1])?;
            synchronize(&client)?;
            let duration_s = start.elapsed().as_secs_f64();
            Ok((duration_s, read(&client, &hidden.logits, Element::F32, model.info.vocab_size)?))
        })?;
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
        if self.decoder.is_none() {
            let asked_bytes = Decoder::bytes_of(&self.passes.spec, cache.capacity);
            self.room.check("the buffers of a decoded token", asked_bytes)?;
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
        let plan = self.prepare(tokens.len(), true, 1)?;
        self.settled(|model| {
            let hidden = model.pass(tokens, &mut Tap::closed(), &plan)?;
            model.capped_logits(&hidden, [tokens.len() - 1, 1])?;
            read(model.passes.client(), &hidden.logits, Element::F32, model.info.vocab_size)
        })
    }

    fn score(&mut self, tokens: &[u32], first_target: usize) -> Result<Vec<TokenScore>, InferenceError> {
        check_targets(tokens, first_target)?;
        let run = run_for_scores(tokens, self.info.n_ctx_max);
        let plan = self.prepare(run.len(), true, self.logit_rows(tokens.len() - first_target))?;
        let scores = self.settled(|model| {
            let hidden = model.pass(run, &mut Tap::closed(), &plan)?;
            model.scores(&hidden, &tokens[first_target..], first_target - 1)
        })?;
        match scores.iter().all(|score| score.nll.is_finite()) {
            true => Ok(scores),
            false => Err(InferenceError::NotFiniteResult { what: "logits".to_owned() }),
        }
    }

    /// One pass, and the logits some rows at a time; the way of `score_keeping` and `score_against` until they pack and compare
    /// on the device.
    fn logits(&mut self, tokens: &[u32], rows: Range<usize>, take: &mut TakeLogits<'_>) -> Result<(), InferenceError> {
        let n_rows = self.logit_rows(rows.len());
        let plan = self.prepare(tokens.len(), true, n_rows)?;
        let client = self.passes.client().clone();
        self.settled(|model| {
            let hidden = model.pass(tokens, &mut Tap::closed(), &plan)?;
            for first in rows.clone().step_by(n_rows) {
                let chunk = n_rows.min(rows.end - first);
                model.capped_logits(&hidden, [first, chunk])?;
                take(&read(&client, &hidden.logits, Element::F32, chunk * model.info.vocab_size)?)?;
            }
            Ok(())
        })
    }

    fn capture(
        &mut self,
        tokens: &[u32],
        filter: &CaptureFilter,
        sink: &mut dyn CaptureSink,
        progress: &dyn Progress,
    ) -> Result<(), InferenceError> {
        let mut tap = Tap::open(filter, sink, progress)?;
        let (n, vocab) = (tokens.len(), self.info.vocab_size);
        let rows = self.logit_rows(n);
        let plan = self.prepare(n, false, rows)?;
        let client = self.passes.client().clone();
        self.settled(|model| {
            let hidden = model.pass(tokens, &mut tap, &plan)?;
            if !tap.wants("lm_head") {
                return Ok(());
            }
            for first in (0..n).step_by(rows) {
                let chunk = rows.min(n - first);
                model.head(&hidden, [first, chunk])?;
                tap.set_first_token(first);
                let (handle, element) = (&hidden.logits, Element::F32);
                let logits = Rows { client: &client, handle, element, n: chunk, stride: vocab, first: 0, width: vocab };
                tap.output("lm_head", None, "lm_head", &logits)?;
            }
            Ok(())
        })
    }
}

/// Returns how many rows of logits fit, in tiles of tensor cores where there are that many.
pub fn logit_rows(vocab_size: usize) -> usize {
    let n = LOGIT_BYTES / (4 * vocab_size);
    if n >= 32 { (n / 32 * 32).min(1024) } else { n.max(1) }
}
