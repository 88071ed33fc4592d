//! Decoding on a device by the general path: a step of burn's operations whose token and position lie on the device, recorded once as a
//! graph and replayed where the device can.

use super::attention::{AttentionPlan, StepTables};
use super::forward::Executor;
use super::kv_cache::KvCache;
use super::score::values;
use crate::inference::{Decoded, InferenceError};
use burn::backend::{Backend, Dispatch, DispatchGraph, ExecutionError};
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use labpipe_kernels::burn_ext::row_ops;
use std::time::Instant;

/// Whole numbers that every step writes where they are, so that a recording finds them again.
struct Buffer(Option<Tensor<1, Int>>);

impl Buffer {
    fn zeros(n: usize, device: &Device) -> Buffer {
        Buffer(Some(Tensor::zeros([n], device)))
    }

    fn get(&self) -> Tensor<1, Int> {
        self.0.clone().expect("a buffer that was taken out to be written to was put back")
    }

    /// Writes in place, which burn does if there is no other reference to the tensor.
    fn write(&mut self, write: impl FnOnce(Tensor<1, Int>) -> Tensor<1, Int>) {
        self.0 = self.0.take().map(write);
    }

    fn set(&mut self, values: Tensor<1, Int>) {
        let n = values.dims()[0];
        self.write(|own| own.slice_assign([0..n], values));
    }
}

/// The buffers of a step and its recording.
pub struct StepDecoder {
    token: Buffer,             // [1]
    position: Buffer,          // [1]
    chosen: Buffer,            // [capacity], the token chosen at each position
    logits: Option<Tensor<2>>, // [1, vocab]
    tables: Vec<StepTables>,
    graph: Option<DispatchGraph>,
    /// Why steps are not recorded, once that was tried.
    unrecorded: Option<String>,
}

impl StepDecoder {
    /// Prepares steps over a cache of `capacity` tokens.
    pub fn new(executor: &Executor, capacity: usize) -> StepDecoder {
        let device = &executor.device;
        let tables = executor.spec.attentions.iter().map(|spec| StepTables::new(spec, capacity, device)).collect();
        StepDecoder {
            token: Buffer::zeros(1, device),
            position: Buffer::zeros(1, device),
            chosen: Buffer::zeros(capacity, device),
            logits: None,
            tables,
            graph: None,
            unrecorded: None,
        }
    }

    /// Generates `n_gen` tokens greedily after those in the cache, the first of them following `token`; each is timed by the host around
    /// an idle device.
    ///
    /// # Errors
    /// The device's failures; `NotFiniteResult` where the last step's logits are not numbers.
    pub fn decode(
        &mut self,
        executor: &Executor,
        cache: &mut KvCache,
        token: u32,
        n_gen: usize,
    ) -> Result<Vec<Decoded>, InferenceError> {
        if n_gen == 0 {
            return Ok(Vec::new());
        }
        let n_past = cache.n_tokens();
        if self.graph.is_none() && self.unrecorded.is_none() {
            self.record(executor, cache, token, n_past)?;
        }
        self.set(&executor.device, token, n_past);
        executor.synchronize()?;
        let mut durations = Vec::with_capacity(n_gen);
        for _ in 0..n_gen {
            let start = Instant::now();
            match &self.graph {
                // SAFETY: every buffer that the recording names is one of this decoder's, of the cache or of the weights, and lives as
                // long as they do: when the cache is replaced, the decoder is too.
                Some(graph) => unsafe { Dispatch::graph_replay(executor.device.as_dispatch(), graph) }
                    .map_err(|error| executor.failure(&error))?,
                None => self.step(executor, cache)?,
            }
            executor.synchronize()?;
            durations.push(start.elapsed().as_secs_f64());
        }
        cache.advance(n_gen);
        let logits = self.logits()?;
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err(InferenceError::NotFiniteResult { what: "logits of a decoded token".to_owned() });
        }
        let chosen = ids(self.chosen.get().slice([n_past..n_past + n_gen]))?;
        Ok(chosen.into_iter().zip(durations).map(|(token, duration_s)| Decoded { token, duration_s }).collect())
    }

    /// Returns the logits that the last token was chosen from, `[vocab]`.
    ///
    /// # Errors
    /// Where they can't be read.
    pub fn logits(&self) -> Result<Vec<f32>, InferenceError> {
        self.logits.clone().map_or(Ok(Vec::new()), values)
    }

    /// Returns why steps are not recorded; `None` if they are, or if no step has run.
    pub fn unrecorded(&self) -> Option<&str> {
        self.unrecorded.as_deref()
    }

    fn set(&mut self, device: &Device, token: u32, position: usize) {
        let word = |value: usize| Tensor::<1, Int>::from_data(TensorData::new(vec![value as i32], [1]), device);
        self.token.set(word(token as usize));
        self.position.set(word(position));
    }

    /// Runs a step, then records one; where the device can't, steps are launched one by one.
    fn record(
        &mut self,
        executor: &Executor,
        cache: &mut KvCache,
        token: u32,
        n_past: usize,
    ) -> Result<(), InferenceError> {
        let device = executor.device.as_dispatch();
        self.set(&executor.device, token, n_past);
        let prepared = Dispatch::graph_prepare(device);
        if let Err(error) = prepared {
            self.unrecorded = Some(reason(&error));
            return Ok(());
        }
        // Compiles every kernel, and writes only what the first step writes again.
        self.step(executor, cache)?;
        executor.synchronize()?;
        self.set(&executor.device, token, n_past);
        executor.synchronize()?;
        if let Err(error) = Dispatch::graph_start_capture(device) {
            self.unrecorded = Some(reason(&error));
            return Ok(());
        }
        let stepped = self.step(executor, cache);
        match Dispatch::graph_stop_capture(device) {
            Ok(graph) => self.graph = Some(graph),
            Err(error) => self.unrecorded = Some(reason(&error)),
        }
        stepped
    }

    /// Launches everything between a token and the next.
    fn step(&mut self, executor: &Executor, cache: &mut KvCache) -> Result<(), InferenceError> {
        let position = self.position.get();
        let plans: Vec<AttentionPlan> =
            self.tables.iter().map(|tables| AttentionPlan::of_step(tables, &position)).collect();
        let logits = executor.step(self.token.get(), &plans, cache)?;
        drop(plans);
        let next = row_ops::argmax(logits.clone());
        self.chosen.write(|own| own.select_assign(0, position.clone(), next.clone(), IndexingUpdateOp::Assign));
        self.token.set(next);
        let after = position.add_scalar(1);
        self.position.set(after);
        self.logits = Some(logits);
        Ok(())
    }
}

fn reason(error: &ExecutionError) -> String {
    format!("decode without a recorded graph, which is slower: {error:?}")
}

fn ids(tensor: Tensor<1, Int>) -> Result<Vec<u32>, InferenceError> {
    let read = tensor.into_data_dtype(DType::I64).try_into_vec::<i64>();
    let words = read.map_err(|error| InferenceError::NotFiniteResult { what: format!("chosen tokens ({error:?})") })?;
    Ok(words.into_iter().map(|word| word as u32).collect())
}
