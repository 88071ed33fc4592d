//! `diff`: what quantization did to each module's output, read back module by module.

use super::bench_tokens::size;
use crate::artifact::{CaptureRecord, CapturedTensor, DiffRecord, ModuleDiff, RecordBody};
use crate::metrics::ActivationDiff;
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Stage, StageContext, StageDescription, StageError, StageInput, StageOutput,
};
use crate::store::{ActivationReader, ScatterWriter, StoreError};
use crate::units::format_significant;

/// The kind.
pub struct Diff;

static DESCRIPTION: StageDescription = StageDescription {
    kind: "diff",
    summary: "Compares two captures module by module: MSE, cosine similarity, SQNR and more.",
    version: 1,
    measures: false,
    computes: false,
    params: &[
        ParamDesc {
            name: "reference",
            ty: ParamType::StageRef(&["capture-activations"]),
            unit: None,
            default: ParamDefault::Required,
            help: "the capture that counts as right",
        },
        ParamDesc {
            name: "candidate",
            ty: ParamType::StageRef(&["capture-activations"]),
            unit: None,
            default: ParamDefault::Required,
            help: "the capture to compare with it",
        },
        ParamDesc {
            name: "mode",
            ty: ParamType::OneOf(&["cumulative"]),
            unit: None,
            default: ParamDefault::Json("\"cumulative\""),
            help: "cumulative: both models ran whole, so that errors add up from layer to layer",
        },
        ParamDesc {
            name: "scatter_points",
            ty: ParamType::Integer { min: 0, max: 1_000_000 },
            unit: Some("points"),
            default: ParamDefault::Json("2000"),
            help: "pairs of values kept a module for the report's scatter plots",
        },
    ],
};

/// Values of each capture that are in memory at once.
const PIECE_VALUES: usize = 1 << 20;

impl Stage for Diff {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let (reference, candidate) = (context.input("reference")?, context.input("candidate")?);
        let (of_reference, of_candidate): (CaptureRecord, CaptureRecord) = (reference.body()?, candidate.body()?);
        if of_reference.tokens_hash != of_candidate.tokens_hash {
            let reason =
                format!("it captured other tokens than {}; give both the same text and n_tokens", reference.address);
            return Err(StageError::Input { address: candidate.address.clone(), reason });
        }
        let (reference_tensors, candidate_tensors) = (outputs(of_reference.tensors), outputs(of_candidate.tensors));
        let only_in = |one: &[CapturedTensor], other: &[CapturedTensor]| -> Vec<String> {
            one.iter().filter(|t| find(other, t).is_none()).map(|t| t.module.clone()).collect()
        };
        let path = context.out_dir.join("scatter.parquet");
        let mut scatter = ScatterWriter::create(&path).map_err(store)?;
        let n_points = size(context.params, "scatter_points");
        context.progress.begin(Some(reference_tensors.len() as u64), "modules");
        let mut modules: Vec<ModuleDiff> = Vec::new();
        for tensor in &reference_tensors {
            if context.progress.is_cancelled() {
                return Err(StageError::Cancelled);
            }
            if let Some(other) = find(&candidate_tensors, tensor) {
                let (row, pairs) = compare(reference, tensor, candidate, other, n_points)?;
                scatter.append(&tensor.module, &pairs).map_err(store)?;
                modules.push(row);
            }
            context.progress.advance(1);
        }
        scatter.finish().map_err(store)?;
        if modules.is_empty() {
            let reason = format!("it and {} have no module in common", reference.address);
            return Err(StageError::Input { address: candidate.address.clone(), reason });
        }
        let worst = modules.iter().min_by(|a, b| a.cosine.total_cmp(&b.cosine));
        let summary = match worst {
            None => "no module is in both captures".to_owned(),
            Some(worst) => {
                format!(
                    "{} modules, lowest cosine {:.4} (MSE {}) in {}",
                    modules.len(),
                    worst.cosine,
                    format_significant(worst.mse),
                    worst.module
                )
            }
        };
        let record = DiffRecord {
            mode: context.params["mode"].as_str().unwrap_or_default().to_owned(),
            n_tokens: of_reference.n_tokens,
            only_in_reference: only_in(&reference_tensors, &candidate_tensors),
            only_in_candidate: only_in(&candidate_tensors, &reference_tensors),
            modules,
        };
        Ok(StageOutput::new(record.to_fields(), summary))
    }
}

fn store(error: StoreError) -> StageError {
    StageError::Other(error.to_string())
}

/// Returns the outputs that a capture kept, in execution order.
fn outputs(tensors: Vec<CapturedTensor>) -> Vec<CapturedTensor> {
    tensors.into_iter().filter(|tensor| tensor.port == "output").collect()
}

fn find<'a>(tensors: &'a [CapturedTensor], wanted: &CapturedTensor) -> Option<&'a CapturedTensor> {
    tensors.iter().find(|tensor| tensor.module == wanted.module)
}

fn compare(
    reference: &StageInput,
    tensor: &CapturedTensor,
    candidate: &StageInput,
    other: &CapturedTensor,
    n_points: usize,
) -> Result<(ModuleDiff, Vec<(f32, f32)>), StageError> {
    let width = tensor.width;
    if width != other.width {
        let reason = format!("{} has {} values a token, {width} in {}", tensor.module, other.width, reference.address);
        return Err(StageError::Input { address: candidate.address.clone(), reason });
    }
    let rows = (PIECE_VALUES / width.max(1)).max(1);
    let mut from_reference = ActivationReader::open(&reference.dir.join(&tensor.file), rows).map_err(store)?;
    let mut from_candidate = ActivationReader::open(&candidate.dir.join(&other.file), rows).map_err(store)?;
    let mut diff = ActivationDiff::new(width);
    let mut sampler = Sampler::new(from_reference.n_rows() * width, n_points);
    loop {
        match (from_reference.next_rows().map_err(store)?, from_candidate.next_rows().map_err(store)?) {
            (None, None) => break,
            (Some(r), Some(c)) if r.len() == c.len() => {
                diff.push_rows(&r, &c).map_err(|error| StageError::Other(format!("{}: {error}", tensor.module)))?;
                sampler.take(&r, &c);
            }
            _ => {
                let reason = format!("{} has another number of tokens than in {}", tensor.module, reference.address);
                return Err(StageError::Input { address: candidate.address.clone(), reason });
            }
        }
    }
    Ok((diff.finish(&tensor.module, tensor.layer_idx, &tensor.op), sampler.pairs))
}

/// Takes every k-th pair, k odd so that it does not keep step with a power-of-two width.
struct Sampler {
    step: usize,
    next: usize,
    seen: usize,
    pairs: Vec<(f32, f32)>,
}

impl Sampler {
    fn new(n_values: usize, n_points: usize) -> Sampler {
        let step = if n_points == 0 { usize::MAX } else { n_values.div_ceil(n_points).max(1) | 1 };
        Sampler { step, next: if n_points == 0 { usize::MAX } else { 0 }, seen: 0, pairs: Vec::new() }
    }

    fn take(&mut self, reference: &[f32], candidate: &[f32]) {
        while self.next < self.seen + reference.len() {
            let at = self.next - self.seen;
            self.pairs.push((reference[at], candidate[at]));
            self.next += self.step;
        }
        self.seen += reference.len();
    }
}
