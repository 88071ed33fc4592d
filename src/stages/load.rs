//! `load`: names a model and checks that its files are whole. Weights are read when a consumer first needs them.

use super::tokenizer;
use crate::artifact::RecordBody;
use crate::event::Level;
use crate::hub::{HubReference, HubSettings, ModelLocation};
use crate::inference::{HubRevision, LoadRecord, ModelRecipe, ModelSource, stored_words};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError, StageOutput,
};
use crate::units::{DType, format_bytes};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The kind.
pub struct Load;

const DTYPES: &[&str] = &["f32", "f16", "bf16"];

static DESCRIPTION: StageDescription = StageDescription {
    kind: "load",
    summary: "Names a model's weights, checks that its files are whole, and tells what it is.",
    version: 2,
    measures: false,
    computes: true,
    params: &[
        ParamDesc {
            name: "model",
            ty: ParamType::Model,
            unit: None,
            default: ParamDefault::Absent,
            help: "a folder in Hugging Face layout, a GGUF file, or a hub id (ORG/NAME, hf://ORG/NAME@REVISION[/FILE.gguf])",
        },
        ParamDesc {
            name: "random",
            ty: ParamType::RandomModel,
            unit: None,
            default: ParamDefault::Absent,
            help: "the shapes of a config.json with random weights, in place of model",
        },
        ParamDesc {
            name: "dtype",
            ty: ParamType::OneOf(DTYPES),
            unit: None,
            default: ParamDefault::Absent,
            help: "how weights are stored; the file's own type unless given",
        },
        ParamDesc {
            name: "compute_dtype",
            ty: ParamType::OneOf(DTYPES),
            unit: None,
            default: ParamDefault::Absent,
            help: "what weights are multiplied in; f32 on a CPU unless given",
        },
    ],
};

impl Stage for Load {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn check(&self, params: &Params) -> Vec<(&'static str, String, Option<String>)> {
        let given = |name: &str| params.get(name).is_some_and(|value| !value.is_null());
        match (given("model"), given("random")) {
            (true, true) => vec![("random", "both model and random are given".to_owned(), Some("keep one".to_owned()))],
            (false, false) => {
                let hint = "model: FOLDER, or random: {config: FILE, seed: N}".to_owned();
                vec![("model", "neither model nor random is given".to_owned(), Some(hint))]
            }
            _ => Vec::new(),
        }
    }

    fn recipe(
        &self,
        params: &Params,
        root: &Path,
        _model: Option<ModelRecipe>,
    ) -> Result<Option<ModelRecipe>, StageError> {
        recipe(params, root).map(Some)
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let recipe = recipe(context.params, context.root)?;
        let rooted = recipe.rooted(context.root);
        let info = context.engine.inspect(&rooted)?;
        context.engine.check_values(&rooted, context.progress)?;
        let mut account = context.engine.account(&rooted)?;
        account.parts.extend(info.tokenizer_dir.as_deref().map(tokenizer::account).unwrap_or_default());
        for warning in account.warnings() {
            context.progress.note(Level::Warning, &warning);
        }
        let weights_bytes = info.weights_bytes();
        let stored = info.stored_quantization.as_ref().map(|stored| {
            let schemes: Vec<&str> = stored.schemes.iter().map(|spec| spec.scheme.as_str()).collect();
            format!(
                ", {} of {} linears {} as {} stored them",
                stored.n_linears,
                info.linears.len(),
                schemes.join(", "),
                stored.format
            )
        });
        // What is kept in another form than the files have it in is not what the model was trained in.
        let in_files =
            stored_words(&account.element_types).filter(|words| stored.is_none() && *words != info.dtype.name());
        let summary = format!(
            "{}, {} parameters, {} as {}{}{}",
            info.family,
            count(info.n_params),
            format_bytes(weights_bytes),
            info.dtype,
            in_files.map(|words| format!(" (stored as {words})")).unwrap_or_default(),
            stored.unwrap_or_default()
        );
        let hub = match &recipe.source {
            ModelSource::Hub(id) => Some(HubRevision { id: id.clone(), commit: commit(id) }),
            ModelSource::Path(_) | ModelSource::Random { .. } => None,
        };
        let record =
            LoadRecord { recipe, model: info, account: Some(account), weights_bytes: Some(weights_bytes), hub };
        Ok(StageOutput::new(record.to_fields(), summary))
    }
}

/// Returns the commit that a hub id stands for in the cache.
fn commit(id: &str) -> Option<String> {
    let reference = HubReference::parse(id).ok()?;
    crate::hub::commit(&reference, &HubSettings::from_env())
}

fn recipe(params: &Params, root: &Path) -> Result<ModelRecipe, StageError> {
    let dtype = |name: &str| params.get(name).and_then(Value::as_str).and_then(DType::parse);
    let source = match params.get("model").and_then(Value::as_str) {
        Some(model) => match ModelLocation::parse(model, root) {
            Ok(ModelLocation::Path(path)) => ModelSource::Path(path),
            Ok(ModelLocation::Hub(reference)) => ModelSource::Hub(reference.to_string()),
            Err(error) => return Err(StageError::Other(error.to_string())),
        },
        None => {
            let random = params.get("random").unwrap_or(&Value::Null);
            let config = PathBuf::from(random["config"].as_str().unwrap_or_default());
            ModelSource::Random { config, seed: random["seed"].as_u64().unwrap_or(0) }
        }
    };
    Ok(ModelRecipe { source, dtype: dtype("dtype"), compute_dtype: dtype("compute_dtype"), quantization: None })
}

/// Formats a number of parameters: `134.5 M`.
pub fn count(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}
