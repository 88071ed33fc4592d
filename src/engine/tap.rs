//! Taps a forward pass: hands the values of chosen sites to a sink as they are computed.

use crate::event::Progress;
use crate::inference::{CaptureFilter, CaptureSink, CaptureSite, InferenceError};
use burn::tensor::Tensor;
use globset::{Glob, GlobSet, GlobSetBuilder};
use std::collections::BTreeMap;

/// Activations that a tap can read: rows on some device.
pub trait Values {
    /// Values in a row.
    fn width(&self) -> usize;

    /// Copies them to the host, row-major.
    ///
    /// # Errors
    /// Where the device that holds them has failed.
    fn read(&self) -> Result<Vec<f32>, InferenceError>;
}

impl Values for Tensor<2> {
    fn width(&self) -> usize {
        self.dims()[1]
    }

    fn read(&self) -> Result<Vec<f32>, InferenceError> {
        let data = self.clone().into_data_dtype(burn::tensor::DType::F32);
        data.try_into_vec::<f32>().map_err(|error| InferenceError::Sink(format!("read captured values: {error:?}")))
    }
}

/// Hands values on, or ignores them where nothing is captured.
pub struct Tap<'a> {
    capture: Option<Capture<'a>>,
}

struct Capture<'a> {
    sink: &'a mut dyn CaptureSink,
    progress: &'a dyn Progress,
    modules: Option<GlobSet>,
    inputs: bool,
    /// Position of the pass's first token.
    first_token_idx: usize,
    /// By source module or other key, the input site under which the values were kept.
    kept_inputs: BTreeMap<String, CaptureSite>,
}

/// The module whose output is another's input.
pub struct Source<'a> {
    pub module: &'a str,
    pub op: &'a str,
}

impl<'a> Tap<'a> {
    /// Captures nothing.
    pub fn closed() -> Tap<'static> {
        Tap { capture: None }
    }

    /// Captures what `filter` chooses.
    ///
    /// # Errors
    /// `Unsupported` where a glob can't be read.
    pub fn open(
        filter: &CaptureFilter,
        sink: &'a mut dyn CaptureSink,
        progress: &'a dyn Progress,
    ) -> Result<Tap<'a>, InferenceError> {
        progress.begin(None, "tensors");
        let modules = if filter.modules.is_empty() { None } else { Some(globs(&filter.modules)?) };
        Ok(Tap {
            capture: Some(Capture {
                sink,
                progress,
                modules,
                inputs: filter.inputs,
                first_token_idx: 0,
                kept_inputs: BTreeMap::new(),
            }),
        })
    }

    /// Sets the position of the first row of the values that follow.
    pub fn set_first_token(&mut self, first_token_idx: usize) {
        if let Some(capture) = &mut self.capture {
            capture.first_token_idx = first_token_idx;
        }
    }

    /// Returns true if a module's outputs are captured.
    pub fn wants(&self, module: &str) -> bool {
        self.capture.as_ref().is_some_and(|capture| capture.wants(module))
    }

    pub fn output(
        &mut self,
        module: &str,
        layer_idx: Option<usize>,
        op: &str,
        values: &impl Values,
    ) -> Result<(), InferenceError> {
        self.take(module, "output", layer_idx, op, values)
    }

    /// Captures an input that is no other site's output.
    pub fn input(
        &mut self,
        module: &str,
        layer_idx: Option<usize>,
        op: &str,
        values: &impl Values,
    ) -> Result<(), InferenceError> {
        if self.capture.as_ref().is_some_and(|capture| capture.inputs) {
            self.take(module, "input", layer_idx, op, values)?;
        }
        Ok(())
    }

    /// Captures an input that is `source`'s output: a note suffices where that is captured, or another such input was.
    pub fn shared_input(
        &mut self,
        module: &str,
        layer_idx: Option<usize>,
        op: &str,
        source: &Source<'_>,
        values: &impl Values,
    ) -> Result<(), InferenceError> {
        let Some(capture) = self.capture.as_mut().filter(|capture| capture.inputs && capture.wants(module)) else {
            return Ok(());
        };
        if capture.wants(source.module) {
            let own = site(module, "input", layer_idx, op);
            let first = site(source.module, "output", layer_idx, source.op);
            return capture.sink.alias(&own, &first).map_err(InferenceError::Sink);
        }
        self.common_input(module, layer_idx, op, source.module, values)
    }

    /// Captures an input that several modules read: a note suffices where another one's was captured under the same `key`.
    pub fn common_input(
        &mut self,
        module: &str,
        layer_idx: Option<usize>,
        op: &str,
        key: &str,
        values: &impl Values,
    ) -> Result<(), InferenceError> {
        let Some(capture) = self.capture.as_mut().filter(|capture| capture.inputs && capture.wants(module)) else {
            return Ok(());
        };
        let own = site(module, "input", layer_idx, op);
        if let Some(first) = capture.kept_inputs.get(key) {
            return capture.sink.alias(&own, first).map_err(InferenceError::Sink);
        }
        capture.kept_inputs.insert(key.to_owned(), own);
        self.take(module, "input", layer_idx, op, values)
    }

    fn take(
        &mut self,
        module: &str,
        port: &'static str,
        layer_idx: Option<usize>,
        op: &str,
        values: &impl Values,
    ) -> Result<(), InferenceError> {
        let Some(capture) = self.capture.as_mut().filter(|capture| capture.wants(module)) else {
            return Ok(());
        };
        let width = values.width();
        let slice = values.read()?;
        if let Some(value) = slice.iter().find(|value| !value.is_finite()) {
            return Err(InferenceError::NotFiniteResult { what: format!("{module} ({port}: {value})") });
        }
        if capture.progress.is_cancelled() {
            return Err(InferenceError::Cancelled);
        }
        capture.progress.advance(1);
        let site = site(module, port, layer_idx, op);
        capture.sink.take(&site, capture.first_token_idx, width, &slice).map_err(InferenceError::Sink)
    }
}

impl Capture<'_> {
    fn wants(&self, module: &str) -> bool {
        self.modules.as_ref().is_none_or(|modules| modules.is_match(module))
    }
}

fn site(module: &str, port: &'static str, layer_idx: Option<usize>, op: &str) -> CaptureSite {
    CaptureSite { module: module.to_owned(), port, layer_idx, op: op.to_owned() }
}

fn globs(patterns: &[String]) -> Result<GlobSet, InferenceError> {
    let unreadable = |error: globset::Error| InferenceError::Unsupported(format!("read module glob: {error}"));
    let mut builder = GlobSetBuilder::new();
    for pattern in patterns {
        builder.add(Glob::new(pattern).map_err(unreadable)?);
    }
    builder.build().map_err(unreadable)
}
