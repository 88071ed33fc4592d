//! `quantize`: chooses a scheme for every linear, and tells what each costs and loses. Packed weights are made again when a
//! consumer first needs them, and written only where `save` asks for it.

use crate::artifact::{QuantizeTotals, QuantizedModule, RecordBody, SavedFolder};
use crate::event::Level;
use crate::inference::{ModelRecipe, QuantizeRecord};
use crate::quantization::{self, QuantizationConfig};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError, StageOutput,
};
use crate::units::format_bytes;
use crate::yaml;
use serde_json::Value;
use std::path::Path;

/// Folder of a saved model in the stage's artifact.
const SAVED: &str = "model";

/// The kind.
pub struct Quantize;

static DESCRIPTION: StageDescription = StageDescription {
    kind: "quantize",
    summary: "Quantizes a loaded model's linear layers by a config, and measures each weight's error and size.",
    version: 1,
    measures: false,
    computes: true,
    params: &[
        ParamDesc {
            name: "model",
            ty: ParamType::StageRef(&["load"]),
            unit: None,
            default: ParamDefault::Required,
            help: "the model to quantize",
        },
        ParamDesc {
            name: "config",
            ty: ParamType::QuantizationConfig,
            unit: None,
            default: ParamDefault::Required,
            help: "which scheme each module gets; files are in experiments/",
        },
        ParamDesc {
            name: "save",
            ty: ParamType::Bool,
            unit: None,
            default: ParamDefault::Json("false"),
            help: "writes the model as a folder that transformers and bitsandbytes open",
        },
    ],
};

impl Stage for Quantize {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn recipe(
        &self,
        params: &Params,
        root: &Path,
        model: Option<ModelRecipe>,
    ) -> Result<Option<ModelRecipe>, StageError> {
        model.map(|model| Ok(ModelRecipe { quantization: Some(applied(&config(params, root)?)), ..model })).transpose()
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let mut recipe = context.input("model")?.recipe()?;
        let config = config(context.params, context.root)?;
        let applied = applied(&config);
        recipe.quantization = Some(applied.clone());
        let rooted = recipe.rooted(context.root);
        let info = context.engine.inspect(&rooted)?;
        if info.tied_embeddings && config.scheme_for("lm_head").is_some() {
            let text = "lm_head shares the embedding's weight and stays in the base dtype";
            context.progress.note(Level::Warning, text);
        }
        for glob in config.unmatched(&info.linears) {
            context.progress.note(Level::Warning, &format!("{glob:?} in config {} matches no module", config.name));
        }
        let mut modules: Vec<QuantizedModule> = Vec::new();
        context.engine.survey(&rooted, context.progress, &mut |module| modules.push(module))?;
        let totals = totals(&modules, info.tied_embeddings, info.n_params, info.dtype.size_bytes() as u64);
        let summary = format!(
            "{}: {} of {} linears, {:.2} bits/weight, {} of weights (base {})",
            config.name,
            totals.n_quantized,
            modules.len(),
            totals.bits_per_weight,
            format_bytes(totals.weights_bytes),
            format_bytes(totals.base_bytes)
        );
        let saved = if context.params.get("save").and_then(Value::as_bool).unwrap_or(false) {
            let saved = context.engine.save(&rooted, &context.out_dir.join(SAVED), context.progress)?;
            Some(SavedFolder { folder: SAVED.to_owned(), format: saved.format, bytes: saved.bytes })
        } else {
            None
        };
        let weights_bytes = Some(totals.weights_bytes);
        let record = QuantizeRecord { recipe, model: info, config: applied, weights_bytes, totals, modules, saved };
        Ok(StageOutput::new(record.to_fields(), summary))
    }
}

/// Returns a config as records hold it: named and unnamed spellings of one meaning leave one record.
fn applied(config: &QuantizationConfig) -> QuantizationConfig {
    QuantizationConfig { name: config.name.clone(), ..config.canonical() }
}

fn config(params: &Params, root: &Path) -> Result<QuantizationConfig, StageError> {
    let value = params.get("config").unwrap_or(&Value::Null);
    let wrap = |error: quantization::QuantizationError| StageError::Other(error.to_string());
    let Some(written) = value.as_str() else {
        return quantization::from_value(value, "inline").map_err(wrap);
    };
    let path = root.join(written);
    let failed = |reason: String| StageError::Read { path: path.clone(), reason };
    let bytes = std::fs::read(&path).map_err(|error| failed(error.to_string()))?;
    let text = yaml::decode(bytes).map_err(|error| failed(error.message))?;
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    quantization::parse(&text, written, &name).map_err(wrap)
}

/// Adds modules up.
fn totals(modules: &[QuantizedModule], tied: bool, n_params: u64, base_size: u64) -> QuantizeTotals {
    let quantized: Vec<&QuantizedModule> = modules.iter().filter(|module| is_quantized(module)).collect();
    let quantized_params: u64 = quantized.iter().map(|module| module.n_params).sum();
    let quantized_bytes: u64 = quantized.iter().map(|module| module.bytes).sum();
    // A tied head is the embedding: its parameters are counted once.
    let counted = modules.iter().filter(|module| !(tied && module.module == "lm_head" && !is_quantized(module)));
    let (counted_params, counted_bytes) =
        counted.fold((0, 0), |(n, b), module| (n + module.n_params, b + module.bytes));
    let weights_bytes = counted_bytes + n_params.saturating_sub(counted_params) * base_size;
    QuantizeTotals {
        n_quantized: quantized.len(),
        n_kept: modules.len() - quantized.len(),
        quantized_params,
        quantized_bytes,
        quantized_bits_per_weight: (quantized_params > 0)
            .then(|| 8.0 * quantized_bytes as f64 / quantized_params as f64),
        weights_bytes,
        base_bytes: n_params * base_size,
        bits_per_weight: 8.0 * weights_bytes as f64 / n_params.max(1) as f64,
    }
}

fn is_quantized(module: &QuantizedModule) -> bool {
    !["f32", "f16", "bf16"].contains(&module.scheme.as_str())
}
