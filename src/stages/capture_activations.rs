//! `capture-activations`: runs a text through a model once and keeps what every operation gave, as Parquet.

use super::MODELS;
use super::bench_tokens::{random_tokens, seed, size, too_long};
use super::peak_memory::note_peak;
use super::text::tokenize;
use crate::artifact::{CaptureRecord, CapturedTensor, RecordBody};
use crate::inference::{CaptureFilter, CaptureSink, CaptureSite, InferenceError, MemoryNeed, ModelInfo, Workload};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError, StageOutput,
};
use crate::store::{ActivationFile, ActivationWriter, StoreError};
use crate::units::{DType, format_bytes};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// The kind.
pub struct CaptureActivations;

static DESCRIPTION: StageDescription = StageDescription {
    kind: "capture-activations",
    summary: "Runs a text through a model once and keeps the output of every operation as Parquet.",
    version: 2,
    measures: false,
    computes: true,
    params: &[
        ParamDesc {
            name: "model",
            ty: ParamType::StageRef(MODELS),
            unit: None,
            default: ParamDefault::Required,
            help: "the model to run",
        },
        ParamDesc {
            name: "text",
            ty: ParamType::TextSource,
            unit: None,
            default: ParamDefault::Absent,
            help: "the text to run; random tokens unless given",
        },
        ParamDesc {
            name: "n_tokens",
            ty: ParamType::Integer { min: 1, max: i64::MAX },
            unit: Some("tokens"),
            default: ParamDefault::Absent,
            help: "how many tokens of it; all of it (500 random ones) unless given",
        },
        ParamDesc {
            name: "modules",
            ty: ParamType::Globs,
            unit: None,
            default: ParamDefault::Json("[]"),
            help: "globs over module names; every operation unless given",
        },
        ParamDesc {
            name: "inputs",
            ty: ParamType::Bool,
            unit: None,
            default: ParamDefault::Json("false"),
            help: "keep inputs too; one that is another module's output is kept once",
        },
        ParamDesc {
            name: "seed",
            ty: ParamType::Integer { min: 0, max: i64::MAX },
            unit: None,
            default: ParamDefault::Json("0"),
            help: "seed of random tokens",
        },
    ],
};

/// Tensors that wait for the writer: bounds what is held beside the model.
const QUEUE: usize = 2;
const RANDOM_TOKENS: usize = 500;

impl Stage for CaptureActivations {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn memory_need(&self, params: &Params, _base: Option<&Params>) -> MemoryNeed {
        let reads_text = params.get("text").is_some_and(|text| !text.is_null());
        let n = match (size(params, "n_tokens"), reads_text) {
            (0, true) => return MemoryNeed::Unknown("it runs the whole of its text; n_tokens would bound it"),
            (0, false) => RANDOM_TOKENS,
            (n, _) => n,
        };
        MemoryNeed::Known(Workload { n_ctx: 0, n_pass: n, n_logits: n, n_gen: 0, captures: true, reads_text })
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let recipe = context.recipe("model")?;
        let info = context.engine.inspect(&recipe)?;
        let (tokens, text_hash) = tokens(context, &info)?;
        if tokens.len() > info.n_ctx_max {
            return Err(too_long(&format!("n_tokens {}", tokens.len()), tokens.len(), &info));
        }
        let globs = context.params["modules"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let filter = CaptureFilter {
            modules: globs.map(str::to_owned).collect(),
            inputs: context.params["inputs"].as_bool().unwrap_or(false),
        };
        let dir = context.out_dir.join("activations");
        std::fs::create_dir_all(&dir).map_err(|source| StageError::Write { path: dir.clone(), source })?;
        let template = ActivationFile {
            module: String::new(),
            port: String::new(),
            layer_idx: None,
            op: String::new(),
            width: 0,
            dtype: if info.compute_dtype == DType::F16 { DType::F16 } else { DType::F32 },
            model: context.input("model")?.address.clone(),
            key: context.input("model")?.key.clone(),
        };
        let mut model = context.models.acquire(&recipe, context.progress)?;
        let memory = context.engine.memory_probe();
        let tensors = capture(&mut **model, &tokens, &filter, template, &dir, context)?;
        note_peak(context, memory, &**model);
        drop(model);
        if tensors.is_empty() {
            let reason = "no module matches; labpipe show on a capture without modules: lists the names".to_owned();
            return Err(StageError::Param { param: "modules".to_owned(), reason });
        }
        let bytes = folder_bytes(&dir);
        let n_files = tensors.iter().map(|tensor| &tensor.file).collect::<std::collections::BTreeSet<_>>().len();
        let summary = format!("{} tensors of {} tokens, {}", n_files, tokens.len(), format_bytes(bytes));
        let token_bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let record = CaptureRecord {
            n_tokens: tokens.len(),
            tokens_hash: blake3::hash(&token_bytes).to_hex().to_string(),
            text_hash,
            activations_bytes: bytes,
            compute_dtype: info.compute_dtype,
            tensors,
        };
        Ok(StageOutput::new(record.to_fields(), summary))
    }
}

fn tokens(context: &StageContext<'_>, info: &ModelInfo) -> Result<(Vec<u32>, Option<String>), StageError> {
    let asked = Some(size(context.params, "n_tokens")).filter(|n| *n > 0);
    // Before anything is made of it: the number comes from the file as it is.
    if let Some(n) = asked.filter(|n| *n > info.n_ctx_max) {
        return Err(too_long(&format!("n_tokens {n}"), n, info));
    }
    let Some(source) = context.params.get("text").filter(|text| !text.is_null()) else {
        return Ok((random_tokens(seed(context.params), asked.unwrap_or(RANDOM_TOKENS), info.vocab_size), None));
    };
    let mut text = tokenize(context, source, info, asked)?;
    if let Some(n) = asked {
        if n > text.tokens.len() {
            let reason = format!("the text has {} tokens, {n} are asked for", text.tokens.len());
            return Err(StageError::Param { param: "n_tokens".to_owned(), reason });
        }
        text.tokens.truncate(n);
    }
    Ok((text.tokens, Some(text.text_hash)))
}

fn folder_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.len()).sum()
}

/// Values on their way to the writer.
struct Chunk {
    site: CaptureSite,
    first_token_idx: usize,
    width: usize,
    values: Vec<f32>,
}

/// Computes on this thread while another compresses and writes.
fn capture(
    model: &mut dyn crate::inference::Model,
    tokens: &[u32],
    filter: &CaptureFilter,
    template: ActivationFile,
    dir: &Path,
    context: &StageContext<'_>,
) -> Result<Vec<CapturedTensor>, StageError> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(QUEUE);
        let writer = scope.spawn(|| write_all(receiver, tokens, template, dir));
        let mut sink = Sink { sender, aliases: Vec::new() };
        let computed = model.capture(tokens, filter, &mut sink, context.progress);
        let aliases = std::mem::take(&mut sink.aliases);
        drop(sink);
        let written = match writer.join() {
            Ok(written) => written,
            Err(_) => {
                return Err(StageError::Other(
                    "write activations: the writing thread panicked; this is a bug".to_owned(),
                ));
            }
        };
        // A writer that failed (a full disk) is the cause of the sink's error, not its consequence.
        let written = written.map_err(|error| StageError::Other(error.to_string()))?;
        computed.map_err(|error| match error {
            InferenceError::Cancelled => StageError::Cancelled,
            other => StageError::Inference(other),
        })?;
        Ok(with_aliases(written, &aliases))
    })
}

struct Sink {
    sender: SyncSender<Chunk>,
    aliases: Vec<(CaptureSite, CaptureSite)>,
}

impl CaptureSink for Sink {
    fn take(&mut self, site: &CaptureSite, first_token_idx: usize, width: usize, values: &[f32]) -> Result<(), String> {
        let chunk = Chunk { site: site.clone(), first_token_idx, width, values: values.to_vec() };
        self.sender.send(chunk).map_err(|_| "the writer stopped".to_owned())
    }

    fn alias(&mut self, site: &CaptureSite, first: &CaptureSite) -> Result<(), String> {
        self.aliases.push((site.clone(), first.clone()));
        Ok(())
    }
}

/// Writes chunks as they come; a site's chunks follow one another, so that one file is open at a time.
fn write_all(
    chunks: Receiver<Chunk>,
    tokens: &[u32],
    template: ActivationFile,
    dir: &Path,
) -> Result<Vec<CapturedTensor>, StoreError> {
    let mut tensors: Vec<CapturedTensor> = Vec::new();
    let mut open: Option<(CaptureSite, ActivationWriter)> = None;
    for chunk in chunks {
        if open.as_ref().is_none_or(|(site, _)| *site != chunk.site) {
            finish(open.take())?;
            let file = file_name(&chunk.site);
            let description = ActivationFile {
                module: chunk.site.module.clone(),
                port: chunk.site.port.to_owned(),
                layer_idx: chunk.site.layer_idx,
                op: chunk.site.op.clone(),
                width: chunk.width,
                ..template.clone()
            };
            let writer = ActivationWriter::create(&dir.join(&file), description)?;
            tensors.push(tensor(&chunk.site, tensors.len(), tokens.len(), chunk.width, &file));
            open = Some((chunk.site.clone(), writer));
        }
        if let Some((_, writer)) = &mut open {
            let n = chunk.values.len() / chunk.width.max(1);
            writer.append(
                chunk.first_token_idx,
                &tokens[chunk.first_token_idx..chunk.first_token_idx + n],
                &chunk.values,
            )?;
        }
    }
    finish(open)?;
    Ok(tensors)
}

fn finish(open: Option<(CaptureSite, ActivationWriter)>) -> Result<(), StoreError> {
    open.map_or(Ok(()), |(_, writer)| writer.finish().map(|_| ()))
}

fn file_name(site: &CaptureSite) -> String {
    format!("{}.{}.parquet", site.module, site.port)
}

fn tensor(site: &CaptureSite, order: usize, n_tokens: usize, width: usize, file: &str) -> CapturedTensor {
    CapturedTensor {
        module: site.module.clone(),
        port: site.port.to_owned(),
        layer_idx: site.layer_idx,
        op: site.op.clone(),
        order,
        n_tokens,
        width,
        file: PathBuf::from("activations").join(file).to_string_lossy().into_owned(),
    }
}

/// Adds a row for every tensor that is kept under another's name.
fn with_aliases(mut tensors: Vec<CapturedTensor>, aliases: &[(CaptureSite, CaptureSite)]) -> Vec<CapturedTensor> {
    let kept: BTreeMap<(String, String), (usize, usize, String)> = tensors
        .iter()
        .map(|tensor| {
            ((tensor.module.clone(), tensor.port.clone()), (tensor.n_tokens, tensor.width, tensor.file.clone()))
        })
        .collect();
    for (site, first) in aliases {
        if let Some((n_tokens, width, file)) = kept.get(&(first.module.clone(), first.port.to_owned())) {
            let order = tensors.len();
            let mut row = tensor(site, order, *n_tokens, *width, "");
            row.file.clone_from(file);
            tensors.push(row);
        }
    }
    tensors
}
