//! `prefill-bench`: how fast a prompt is read, in one pass to the first token's logits, or to all its tokens' likelihoods.

use super::MODELS;
use super::bench_starts::{
    self, STARTS, Speed, check, combine_common, combine_rows, n_starts, read_starts, sample_plan,
};
use super::bench_tokens::{sizes, tokens, too_long};
use super::bench_watch::Watch;
use crate::artifact::{BenchCommon, PrefillRecord, PrefillResult};
use crate::bench::{combine_prefills, prefill_label, prefill_result};
use crate::inference::{MemoryNeed, Threads, Workload};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError, StageOutput,
};
use serde_json::Value;

/// The kind.
pub struct PrefillBench;

static DESCRIPTION: StageDescription = StageDescription {
    kind: "prefill-bench",
    summary: "Times whole prompts in one pass to the first token's logits, or to every token's likelihood.",
    version: 5,
    measures: true,
    computes: true,
    params: &[
        ParamDesc {
            name: "model",
            ty: ParamType::StageRef(MODELS),
            unit: None,
            default: ParamDefault::Required,
            help: "the model to time",
        },
        ParamDesc {
            name: "n_prompt",
            ty: ParamType::Integers { min: 1, max: i64::MAX },
            unit: Some("tokens"),
            default: ParamDefault::Json("[128]"),
            help: "prompt lengths",
        },
        ParamDesc {
            name: "samples",
            ty: ParamType::Integer { min: 1, max: 100_000 },
            unit: Some("passes"),
            default: ParamDefault::Json("5"),
            help: "passes that count, for each length, over all starts",
        },
        STARTS,
        ParamDesc {
            name: "warmup",
            ty: ParamType::Integer { min: 0, max: 100_000 },
            unit: Some("passes"),
            default: ParamDefault::Json("2"),
            help: "passes before those, in each start",
        },
        ParamDesc {
            name: "score",
            ty: ParamType::Bool,
            unit: None,
            default: ParamDefault::Json("false"),
            help: "go on to the negative log-likelihood of every token of the prompt, as ppl does",
        },
        ParamDesc {
            name: "text",
            ty: ParamType::TextSource,
            unit: None,
            default: ParamDefault::Absent,
            help: "where the prompt comes from; random tokens unless given",
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

const METHOD: &str = "each sample is one pass over the whole prompt from an empty cache to the last position's logits on the \
                      host; tokenizing and sampling stay outside";

const SCORE_METHOD: &str = "each sample is one pass over the whole prompt from an empty cache to the negative log-likelihoods of \
                            all its tokens but the first on the host, as ppl scores a window; tokens a second count the whole \
                            prompt; tokenizing stays outside";

impl Stage for PrefillBench {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn check(&self, params: &Params) -> Vec<(&'static str, String, Option<String>)> {
        let is_short = scores(params) && sizes(params, "n_prompt").iter().any(|n| *n < 2);
        let message = "score needs prompts of two tokens at least: the first has nothing before it".to_owned();
        let too_short = is_short.then_some(("n_prompt", message, None));
        too_short.into_iter().chain(check(params)).collect()
    }

    fn n_starts(&self, params: &Params, is_host: bool) -> usize {
        n_starts(params, is_host)
    }

    fn memory_need(&self, params: &Params, _base: Option<&Params>) -> MemoryNeed {
        let n = sizes(params, "n_prompt").into_iter().max().unwrap_or(0);
        let n_logits = if scores(params) { n.saturating_sub(1) } else { 1 };
        let reads_text = params.get("text").is_some_and(|text| !text.is_null());
        MemoryNeed::Known(Workload { n_ctx: n, n_pass: n, n_logits, reads_text, ..Workload::default() })
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let recipe = context.recipe("model")?;
        let info = context.engine.inspect(&recipe)?;
        let lengths = sizes(context.params, "n_prompt");
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest > info.n_ctx_max {
            return Err(too_long(&format!("n_prompt {longest}"), longest, &info));
        }
        let tokens = tokens(context, &info, longest)?;
        let scores = scores(context.params);
        let plan = sample_plan(context);
        let mut model = context.models.acquire(&recipe, context.progress)?;
        // After loading: what quantizing took for a moment is not what running takes.
        let mut probe = context.engine.memory_probe();
        let mut watch = Watch::start(context, Threads::All);
        model.reserve(longest)?;
        context.progress.begin(Some((lengths.len() * (plan.warmup + plan.samples)) as u64), "passes");
        let mut results: Vec<PrefillResult> = Vec::new();
        for n_prompt in lengths {
            let (prompt, label) = (&tokens[..n_prompt], prefill_label(n_prompt, scores));
            let mut pass = || {
                let duration_s = match scores {
                    false => model.prefill(prompt).map(|prefilled| prefilled.duration_s),
                    true => model.score_timed(prompt, 1).map(|(duration_s, _)| duration_s),
                };
                Ok::<_, StageError>(duration_s.map_err(|error| error.in_case(&label))?)
            };
            let mean_s = |samples_s: &[f64]| samples_s.iter().sum::<f64>() / samples_s.len() as f64;
            let mut case = watch.sample(&label, plan, mean_s, |counts, regions| {
                // One region for all passes: they follow one another, and a counter of energy moves seldom.
                if counts {
                    regions.begin();
                }
                pass()
            })?;
            watch.energy(&label, &mut case, n_prompt, false, |_| pass().map(|_| ()))?;
            probe.mark();
            let row = prefill_result(n_prompt, scores, &[case.samples]);
            results.extend(row.map(|row| PrefillResult { disturbance: Some(case.disturbance), ..row }));
        }
        let memory = probe.finish().of_model(model.weights_bytes(), model.kv_cache_bytes());
        let (watched, engine) = (watch.finish(), context.engine.info());
        let method = if scores { SCORE_METHOD } else { METHOD };
        let record = PrefillRecord {
            results,
            common: BenchCommon {
                power: watched.power,
                n_other_processes: watched.others.map(|others| others.n),
                other_processes_bytes: watched.others.and_then(|others| others.bytes),
                memory,
                method: method.to_owned(),
                clock: engine.clock,
                engine: engine.backend,
                compute_dtype: model.info().compute_dtype,
            },
        };
        Ok(output(&record))
    }

    fn combine(&self, outputs: Vec<StageOutput>) -> Result<StageOutput, StageError> {
        let starts: Vec<PrefillRecord> = read_starts(outputs)?;
        let rows: Vec<Vec<PrefillResult>> = starts.iter().map(|start| start.results.clone()).collect();
        let common: Vec<&BenchCommon> = starts.iter().map(|start| &start.common).collect();
        Ok(output(&PrefillRecord { results: combine_rows(&rows, combine_prefills)?, common: combine_common(&common)? }))
    }
}

fn output(record: &PrefillRecord) -> StageOutput {
    let speeds = record.results.iter().map(|row| Speed {
        label: &row.label,
        tokens_per_second: row.tokens_per_second,
        low: row.tokens_per_second_low,
        high: row.tokens_per_second_high,
        starts: &row.starts,
        disturbance: row.disturbance.as_ref(),
    });
    bench_starts::output(record, &record.common, speeds, 0)
}

/// Returns true where every token of a prompt is scored.
fn scores(params: &Params) -> bool {
    params.get("score").and_then(Value::as_bool).unwrap_or(false)
}
