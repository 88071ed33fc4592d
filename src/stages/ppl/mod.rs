//! `ppl`: perplexity of a text, under one convention or several, and how far a model is from its base on the same tokens.
//!
//! A base model's stage keeps its log-probabilities once (`keep_log_probs`); every candidate names that stage as its `base`
//! and takes text and windows from it.

mod base;
mod passes;
mod settings;

use super::MODELS;
use super::peak_memory::note_peak;
use super::text::TextForModel;
use crate::artifact::{
    BlockInterval, DivergenceResult, KeptLogProbs, PplRecord, PplResult, RecordBody, TokenScores, TokenScoresFile,
};
use crate::inference::{LogProbFormat, MemoryNeed, Model, ModelInfo, Workload, run_for_scores};
use crate::metrics::{Convention, PerplexitySum, TokenPair, by_document, divergence, mean_interval};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError, StageOutput,
};
use crate::store::{LogProbWriter, StoreError, write_token_scores};
use crate::units::format_bytes;
use base::{Base, BasePass};
use passes::{Pass, passes};
use settings::Settings;
use std::time::Instant;

/// The kind.
pub struct Ppl;

const KEEP: &[&str] = &["none", "f16", "f32", "top-k"];

static DESCRIPTION: StageDescription = StageDescription {
    kind: "ppl",
    summary: "Measures perplexity of a text, each convention stamped into its row, and divergence from a base model.",
    version: 5,
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
            name: "base",
            ty: ParamType::StageRef(&["ppl"]),
            unit: None,
            default: ParamDefault::Absent,
            help: "the base model's ppl stage, with keep_log_probs: text and windows are its, and divergence from it is told",
        },
        ParamDesc {
            name: "text",
            ty: ParamType::TextSource,
            unit: None,
            default: ParamDefault::Absent,
            help: "the text to score; the base's where there is one",
        },
        ParamDesc {
            name: "convention",
            ty: ParamType::SomeOf(&Convention::NAMES),
            unit: None,
            default: ParamDefault::Absent,
            help: "how windows are cut and weighted; the base's, else hf-strided",
        },
        ParamDesc {
            name: "max_length",
            ty: ParamType::Integer { min: 2, max: i64::MAX },
            unit: Some("tokens"),
            default: ParamDefault::Absent,
            help: "window length; the base's, else 512",
        },
        ParamDesc {
            name: "stride",
            ty: ParamType::Integer { min: 1, max: i64::MAX },
            unit: Some("tokens"),
            default: ParamDefault::Absent,
            help: "tokens between the starts of two windows of hf-strided, at most max_length; the base's, else 256",
        },
        ParamDesc {
            name: "allow_short",
            ty: ParamType::Bool,
            unit: None,
            default: ParamDefault::Json("false"),
            help: "score a text that is shorter than one window as a single short one",
        },
        ParamDesc {
            name: "add_bos_token",
            ty: ParamType::Bool,
            unit: None,
            default: ParamDefault::Json("false"),
            help: "lm-eval: also predict what the tokenizer adds to a document by itself, as its option of that name does",
        },
        ParamDesc {
            name: "keep_log_probs",
            ty: ParamType::OneOf(KEEP),
            unit: None,
            default: ParamDefault::Json("\"none\""),
            help: "keep the model's distributions, so that other stages may name this one as their base",
        },
        ParamDesc {
            name: "top_k",
            ty: ParamType::Integer { min: 1, max: 1 << 20 },
            unit: Some("tokens"),
            default: ParamDefault::Json("64"),
            help: "likeliest tokens kept a position with keep_log_probs: top-k",
        },
        ParamDesc {
            name: "log_probs_max_gib",
            ty: ParamType::Float { min: 0.0, max: 1e6 },
            unit: Some("GiB"),
            default: ParamDefault::Json("8.0"),
            help: "most disk that keep_log_probs may ask for, before compression",
        },
    ],
};

impl Stage for Ppl {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn check(&self, params: &Params) -> Vec<(&'static str, String, Option<String>)> {
        settings::check(params)
    }

    fn complete(&self, params: &mut Params) {
        settings::complete(params);
    }

    fn memory_need(&self, params: &Params, base: Option<&Params>) -> MemoryNeed {
        let n = settings::max_length(params, base);
        MemoryNeed::Known(Workload {
            n_ctx: 0,
            n_pass: n,
            n_logits: n.saturating_sub(1),
            reads_text: true,
            ..Workload::default()
        })
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let recipe = context.recipe("model")?;
        let info = context.engine.inspect(&recipe)?;
        let settings = Settings::of(context)?;
        settings.fits(&info)?;
        let text = TextForModel::open(context, &settings.text, &info)?;
        let passes = passes(&settings, &text)?;
        // A tokenizer takes more than the activations of a window.
        drop(text);
        let base = settings.base.map(|input| Base::open(input, &info, &passes[0].tokenizer_hash)).transpose()?;
        let keep = settings.keep;
        let n_scored: usize = passes.iter().map(Pass::n_scored).sum();
        settings.fits_disk(n_scored, info.vocab_size)?;
        let mut model = context.models.acquire(&recipe, context.progress)?;
        let memory = context.engine.memory_probe();
        let mut outcome = Outcome::default();
        for pass in &passes {
            let mut base = base.as_ref().map(|base| base.pass(pass)).transpose()?;
            let mut kept = keep.map(|format| Kept::create(context, pass, format, &info)).transpose()?;
            let (scores, sum) = score(&mut **model, pass, base.as_mut(), kept.as_mut(), context, &mut outcome.speed)?;
            let nll = mean_interval(&by_document(&scores.nll, &scores.document_idx));
            outcome
                .results
                .extend(pass.conventions.iter().map(|convention| row(*convention, pass, &sum, nll.as_ref())));
            outcome.divergences.extend(base.and_then(|base| base.divergence(pass, &scores)));
            outcome.kept.extend(kept.map(Kept::finish).transpose()?);
            let file = format!("tokens-{}.parquet", pass.cut.name());
            write_token_scores(&context.out_dir.join(&file), &scores).map_err(store)?;
            outcome.token_files.push(TokenScoresFile { windows: pass.cut.name(), file });
        }
        note_peak(context, memory, &**model);
        outcome.results.sort_by_key(|row| settings.conventions.iter().position(|one| one.name() == row.convention));
        Ok(outcome.output(&settings, &info))
    }
}

fn store(error: StoreError) -> StageError {
    StageError::Other(error.to_string())
}

/// What a run gathers, pass by pass.
#[derive(Default)]
struct Outcome {
    results: Vec<PplResult>,
    divergences: Vec<DivergenceResult>,
    kept: Vec<KeptLogProbs>,
    token_files: Vec<TokenScoresFile>,
    speed: Speed,
}

/// What the model took to score, all windows together.
#[derive(Default)]
struct Speed {
    n_tokens_run: usize,
    scoring_s: f64,
}

const SPEED_METHOD: &str = "wall clock around the model's scoring calls, over the tokens of all windows, those that overlap as \
                            often as they are run; loading, tokenizing and writing stay outside, log-probabilities that are kept \
                            or compared do not. No benchmark: nothing was warmed up, other stages may have run beside it \
                            (prefill-bench with score: true is one)";

impl Outcome {
    fn output(self, settings: &Settings<'_>, info: &ModelInfo) -> StageOutput {
        let mut summary: Vec<String> = self.results.iter().map(told).collect();
        summary.extend(self.divergences.first().map(|row| {
            let ends = row.kl_mean_interval.as_ref().map(|found| format!(" [{:.3e}, {:.3e}]", found.low, found.high));
            let (kl, ends, top1) = (row.kl_mean, ends.unwrap_or_default(), 100.0 * row.top1_agreement);
            format!("KL {kl:.3e}{ends} nats, same top {top1:.2} % ({}, n = {})", row.convention, row.n_scored)
        }));
        summary.extend((!self.kept.is_empty()).then(|| {
            let bytes = self.kept.iter().map(|kept| kept.bytes).sum();
            format!("log-probabilities kept: {}", format_bytes(bytes))
        }));
        let Speed { n_tokens_run, scoring_s } = self.speed;
        let record = PplRecord {
            results: self.results,
            base: settings.base.map(|base| base.address.clone()),
            divergence: settings.base.map(|_| self.divergences),
            log_probs: settings.keep.map(|_| self.kept),
            token_scores: self.token_files,
            n_tokens_run,
            scoring_s,
            scoring_tokens_per_second: (scoring_s > 0.0).then(|| n_tokens_run as f64 / scoring_s),
            scoring_method: SPEED_METHOD.to_owned(),
            compute_dtype: info.compute_dtype,
        };
        StageOutput::new(record.to_fields(), summary.join(", "))
    }
}

/// Returns a row in words; intervals are 95 % ones.
fn told(row: &PplResult) -> String {
    let ends = |interval: &Option<BlockInterval>, n_decimals: usize| {
        let finite = interval.as_ref().filter(|found| found.low.is_finite() && found.high.is_finite());
        finite.map_or_else(String::new, |found| format!(" [{:.n_decimals$}, {:.n_decimals$}]", found.low, found.high))
    };
    let blocks = match &row.nll_interval {
        Some(found) => format!("n = {} in {} blocks", row.n_scored, found.n_blocks),
        None => format!("n = {}", row.n_scored),
    };
    if let (Some(word), Some(bits)) = (row.word_perplexity, row.bits_per_byte) {
        let (word_ends, bits_ends) = (ends(&row.word_perplexity_interval, 3), ends(&row.bits_per_byte_interval, 4));
        return format!("word ppl {word:.3}{word_ends}, {bits:.4}{bits_ends} bits/byte ({}, {blocks})", row.convention);
    }
    let ppl_ends = ends(&row.perplexity_interval, 3);
    // exp of it may be beyond any number: the mean itself never is.
    let nll = if row.perplexity.is_finite() { String::new() } else { format!(", NLL {:.5} nats", row.nll_mean) };
    let own = row.llama_cpp_stderr.filter(|stderr| stderr.is_finite());
    let own = own.map_or_else(String::new, |stderr| format!("; llama.cpp's own ± {stderr:.3}"));
    format!("ppl {:.3}{ppl_ends}{nll} ({}, {blocks}{own})", row.perplexity, row.convention)
}

/// The file that a pass leaves for candidates.
struct Kept {
    writer: LogProbWriter,
    format: LogProbFormat,
    name: String,
    path: std::path::PathBuf,
}

impl Kept {
    fn create(
        context: &StageContext<'_>,
        pass: &Pass,
        format: LogProbFormat,
        info: &ModelInfo,
    ) -> Result<Kept, StageError> {
        let name = format!("log_probs-{}.parquet", pass.cut.name());
        let path = context.out_dir.join(&name);
        Ok(Kept { writer: LogProbWriter::create(&path, format, info.vocab_size).map_err(store)?, format, name, path })
    }

    fn finish(self) -> Result<KeptLogProbs, StageError> {
        let n_tokens = self.writer.finish().map_err(store)?;
        let meta = std::fs::metadata(&self.path);
        let bytes = meta.map_err(|error| StageError::Read { path: self.path, reason: error.to_string() })?.len();
        Ok(KeptLogProbs {
            format: settings::format_name(self.format),
            file: self.name,
            n_tokens,
            bytes,
            bytes_per_token: bytes as f64 / n_tokens.max(1) as f64,
        })
    }
}

/// Scores every window of a pass.
fn score(
    model: &mut dyn Model,
    pass: &Pass,
    mut base: Option<&mut BasePass>,
    mut kept: Option<&mut Kept>,
    context: &StageContext<'_>,
    speed: &mut Speed,
) -> Result<(TokenScores, PerplexitySum), StageError> {
    context.progress.begin(Some(pass.windows.len() as u64), "windows");
    let (mut scores, mut sum) = (TokenScores::default(), PerplexitySum::default());
    for (window_idx, window) in pass.windows.iter().enumerate() {
        if context.progress.is_cancelled() {
            return Err(StageError::Cancelled);
        }
        let tokens = &pass.tokens[window.begin..window.end];
        let first = scores.nll.len();
        let start = Instant::now();
        match (&mut base, &mut kept) {
            (Some(base), _) => {
                for score in model.score_against(tokens, window.first_target, &mut base.reader)? {
                    let token_idx = scores.nll.len();
                    scores.base_nll.push(base.scores.nll[token_idx]);
                    scores.same_top.push(base.scores.argmax[token_idx] == score.argmax);
                    scores.nll.push(score.nll);
                    scores.argmax.push(score.argmax);
                    scores.kl.push(score.kl);
                }
            }
            (None, kept) => {
                let found = match kept {
                    Some(kept) => model.score_keeping(tokens, window.first_target, kept.format, &mut kept.writer)?,
                    None => model.score(tokens, window.first_target)?,
                };
                scores.nll.extend(found.iter().map(|score| score.nll));
                scores.argmax.extend(found.iter().map(|score| score.argmax));
            }
        }
        speed.scoring_s += start.elapsed().as_secs_f64();
        speed.n_tokens_run += run_for_scores(tokens, model.info().n_ctx_max).len();
        scores.token_id.extend(&tokens[window.first_target..]);
        scores.document_idx.extend(pass.document_idx(window));
        scores.window_idx.resize(scores.nll.len(), u32::try_from(window_idx).unwrap_or(u32::MAX));
        sum.push(window, &scores.nll[first..]);
        context.progress.advance(1);
    }
    Ok((scores, sum))
}

/// Returns a convention's row; `nll` is the interval of the mean NLL with equal weights.
fn row(convention: Convention, pass: &Pass, sum: &PerplexitySum, nll: Option<&BlockInterval>) -> PplResult {
    let (perplexity, stderr) = sum.perplexity(convention);
    let nll_mean = sum.nll_mean(convention);
    let nll = nll.map(|interval| interval.around(nll_mean));
    let units = pass.units;
    // Of a unit of so many tokens each.
    let per = |n_units: usize| sum.n_scored() as f64 / n_units as f64;
    let exp_per = |n_units: usize| {
        let n = per(n_units);
        let slope = |interval: &BlockInterval| n * (interval.value * n).exp();
        nll.as_ref().and_then(|interval| interval.map(|nll| (nll * n).exp(), slope(interval)))
    };
    let bits_interval = |n_bytes: usize| {
        let scale = per(n_bytes) / std::f64::consts::LN_2;
        nll.as_ref().and_then(|interval| interval.map(|nll| nll * scale, scale))
    };
    let perplexity_interval = nll.as_ref().and_then(BlockInterval::exp);
    let word_interval = units.and_then(|units| exp_per(units.n_words));
    let byte_interval = units.and_then(|units| exp_per(units.n_bytes));
    let bits_interval = units.and_then(|units| bits_interval(units.n_bytes));
    let stderr_of = |interval: &Option<BlockInterval>| interval.as_ref().map(|interval| interval.stderr);
    PplResult {
        convention: convention.name().to_owned(),
        max_length: pass.max_length,
        stride: pass.stride,
        n_tokens: pass.n_tokens,
        n_windows: pass.windows.len(),
        n_scored: sum.n_scored(),
        bos: pass.bos.clone(),
        text_hash: pass.text_hash.clone(),
        tokenizer_hash: pass.tokenizer_hash.clone(),
        nll_mean,
        perplexity,
        stderr: stderr_of(&perplexity_interval),
        nll_stderr: stderr_of(&nll),
        perplexity_interval,
        llama_cpp_stderr: stderr.filter(|_| convention == Convention::LlamaCpp),
        n_documents: pass.n_documents,
        n_words: units.map(|units| units.n_words),
        n_bytes: units.map(|units| units.n_bytes),
        word_perplexity: units.map(|units| sum.perplexity_per(units.n_words)),
        word_perplexity_stderr: stderr_of(&word_interval),
        word_perplexity_interval: word_interval,
        byte_perplexity: units.map(|units| sum.perplexity_per(units.n_bytes)),
        byte_perplexity_stderr: stderr_of(&byte_interval),
        byte_perplexity_interval: byte_interval,
        bits_per_byte: units.map(|units| sum.bits_per_byte(units.n_bytes)),
        bits_per_byte_stderr: stderr_of(&bits_interval),
        bits_per_byte_interval: bits_interval,
        nll_interval: nll,
    }
}

impl BasePass {
    /// Returns how far the model is from the base; None where no token was scored.
    fn divergence(&self, pass: &Pass, own: &TokenScores) -> Option<DivergenceResult> {
        let pairs: Vec<TokenPair> = (0..own.nll.len())
            .map(|i| TokenPair { base_nll: own.base_nll[i], nll: own.nll[i], kl: own.kl[i], same_top: own.same_top[i] })
            .collect();
        let convention = pass.conventions.first().map_or("", |convention| convention.name());
        Some(DivergenceResult {
            convention: convention.to_owned(),
            max_length: pass.max_length,
            stride: pass.stride,
            base_log_probs: self.format.clone(),
            ..divergence(&pairs, &own.document_idx)?
        })
    }
}
