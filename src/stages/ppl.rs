//! `ppl`: perplexity of a text, under one convention or several.

use super::MODELS;
use super::bench_tokens::size;
use super::text::{TokenizedText, tokenize};
use crate::artifact::PplResult;
use crate::metrics::{Convention, PerplexitySum, windows};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError, StageOutput,
};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The kind.
pub struct Ppl;

static DESCRIPTION: StageDescription = StageDescription {
    kind: "ppl",
    summary: "Measures perplexity of a text, each convention stamped into its row.",
    version: 1,
    measures: false,
    computes: true,
    params: &[
        ParamDesc {
            name: "model",
            ty: ParamType::StageRef(MODELS),
            unit: None,
            default: ParamDefault::Required,
            help: "the model to score with",
        },
        ParamDesc {
            name: "text",
            ty: ParamType::TextSource,
            unit: None,
            default: ParamDefault::Required,
            help: "the text to score",
        },
        ParamDesc {
            name: "convention",
            ty: ParamType::SomeOf(&Convention::NAMES),
            unit: None,
            default: ParamDefault::Json("[\"hf-strided\"]"),
            help: "how windows are cut and weighted",
        },
        ParamDesc {
            name: "max_length",
            ty: ParamType::Integer { min: 2, max: i64::MAX },
            unit: Some("tokens"),
            default: ParamDefault::Json("512"),
            help: "window length",
        },
        ParamDesc {
            name: "stride",
            ty: ParamType::Integer { min: 1, max: i64::MAX },
            unit: Some("tokens"),
            default: ParamDefault::Json("256"),
            help: "tokens between the starts of two windows, at most max_length; disjoint windows ignore it",
        },
        ParamDesc {
            name: "allow_short",
            ty: ParamType::Bool,
            unit: None,
            default: ParamDefault::Json("false"),
            help: "score a text that is shorter than one window as a single short one",
        },
    ],
};

impl Stage for Ppl {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn check(&self, params: &Params) -> Vec<(&'static str, String, Option<String>)> {
        let (stride, max_length) = (size(params, "stride"), size(params, "max_length"));
        if stride > max_length {
            let message = format!("stride {stride} is more than max_length {max_length}: tokens would be left out");
            return vec![("stride", message, None)];
        }
        Vec::new()
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let recipe = context.recipe("model")?;
        let info = context.engine.inspect(&recipe)?;
        let max_length = size(context.params, "max_length");
        if max_length > info.n_ctx_max {
            let reason = format!("{max_length} tokens are more than the model's context of {}", info.n_ctx_max);
            return Err(StageError::Param { param: "max_length".to_owned(), reason });
        }
        let text = tokenize(context, &context.params["text"], &info)?;
        let may_be_short = context.params["allow_short"].as_bool().unwrap_or(false);
        if text.tokens.len() < max_length && !may_be_short {
            let n = text.tokens.len();
            let reason = format!(
                "{n} tokens are less than one window of max_length {max_length}; take a longer text, a smaller max_length, or allow_short: true"
            );
            return Err(StageError::Param { param: "text".to_owned(), reason });
        }
        let named = context.params["convention"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let conventions: Vec<Convention> = named.filter_map(Convention::parse).collect();
        // Conventions that cut the same windows are scored once.
        let mut by_stride: BTreeMap<usize, Vec<Convention>> = BTreeMap::new();
        for convention in &conventions {
            by_stride
                .entry(convention.stride(size(context.params, "stride"), max_length))
                .or_default()
                .push(*convention);
        }
        let mut model = context.models.acquire(&recipe, context.progress)?;
        let mut results: Vec<PplResult> = Vec::new();
        for (stride, conventions) in by_stride {
            let windows = windows(text.tokens.len(), max_length, stride)
                .map_err(|error| StageError::Param { param: "text".to_owned(), reason: error.to_string() })?;
            context.progress.begin(Some(windows.len() as u64), "windows");
            let mut sum = PerplexitySum::default();
            for window in &windows {
                if context.progress.is_cancelled() {
                    return Err(StageError::Cancelled);
                }
                let scores = model.score(&text.tokens[window.begin..window.end], window.first_target)?;
                let nlls: Vec<f64> = scores.iter().map(|score| score.nll).collect();
                sum.push(window, &nlls);
                context.progress.advance(1);
            }
            let row = |convention| row(convention, max_length, stride, windows.len(), &text, &sum);
            results.extend(conventions.into_iter().map(row));
        }
        results.sort_by_key(|row| conventions.iter().position(|convention| convention.name() == row.convention));
        let summary: Vec<String> = results
            .iter()
            .map(|row| {
                format!("ppl {:.3} ± {:.3} ({}, n = {})", row.perplexity, row.stderr, row.convention, row.n_scored)
            })
            .collect();
        let mut body = Map::new();
        body.insert("results".to_owned(), json!(results));
        body.insert("compute_dtype".to_owned(), json!(info.compute_dtype));
        Ok(StageOutput { body, summary: summary.join(", ") })
    }
}

fn row(
    convention: Convention,
    max_length: usize,
    stride: usize,
    n_windows: usize,
    text: &TokenizedText,
    sum: &PerplexitySum,
) -> PplResult {
    let (perplexity, stderr) = sum.perplexity(convention);
    PplResult {
        convention: convention.name().to_owned(),
        max_length,
        stride,
        n_tokens: text.tokens.len(),
        n_windows,
        n_scored: sum.n_scored(),
        bos: text.bos.clone(),
        text_hash: text.text_hash.clone(),
        tokenizer_hash: text.tokenizer_hash.clone(),
        nll_mean: sum.nll_mean(convention),
        perplexity,
        stderr,
    }
}
