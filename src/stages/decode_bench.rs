//! `decode-bench`: how fast tokens are generated one by one, each of them timed.

use super::MODELS;
use super::bench_starts::{
    self, STARTS, Speed, check, combine_common, combine_rows, n_starts, read_starts, sample_plan,
};
use super::bench_tokens::{size, sizes, tokens, too_long};
use super::bench_watch::{Watch, Work};
use crate::artifact::{BenchCommon, DecodeRecord, DecodeResult};
use crate::bench::{combine_decodes, decode_label, decode_result};
use crate::event::Level;
use crate::inference::{
    CHECKED_POSITIONS, MemoryNeed, ModelInfo, ModelRecipe, Threads, Workload, check_decode, decode_budget,
};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError, StageOutput,
};

/// The kind.
pub struct DecodeBench;

static DESCRIPTION: StageDescription = StageDescription {
    kind: "decode-bench",
    summary: "Times greedy generation token by token, after contexts of given depths.",
    version: 4,
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
            name: "n_gen",
            ty: ParamType::Integer { min: 1, max: 1_000_000 },
            unit: Some("tokens"),
            default: ParamDefault::Json("32"),
            help: "tokens generated a sequence",
        },
        ParamDesc {
            name: "n_depth",
            ty: ParamType::Integers { min: 0, max: i64::MAX },
            unit: Some("tokens"),
            default: ParamDefault::Json("[0]"),
            help: "context before the first generated token; 0 is a single first token",
        },
        ParamDesc {
            name: "samples",
            ty: ParamType::Integer { min: 1, max: 100_000 },
            unit: Some("sequences"),
            default: ParamDefault::Json("5"),
            help: "sequences that count, for each depth, over all starts",
        },
        STARTS,
        ParamDesc {
            name: "warmup",
            ty: ParamType::Integer { min: 0, max: 100_000 },
            unit: Some("sequences"),
            default: ParamDefault::Json("1"),
            help: "sequences before those, in each start",
        },
        ParamDesc {
            name: "text",
            ty: ParamType::TextSource,
            unit: None,
            default: ParamDefault::Absent,
            help: "where the context comes from; random tokens unless given",
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

const METHOD: &str = "each token is timed alone, from its id to the logits after it; filling the context stays outside; on a CPU choosing \
                      the next token does too, on a device it is the last step";

impl Stage for DecodeBench {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn check(&self, params: &Params) -> Vec<(&'static str, String, Option<String>)> {
        check(params).into_iter().collect()
    }

    fn n_starts(&self, params: &Params, is_host: bool) -> usize {
        n_starts(params, is_host)
    }

    fn memory_need(&self, params: &Params, _base: Option<&Params>) -> MemoryNeed {
        let n_gen = size(params, "n_gen");
        let deepest = sizes(params, "n_depth").into_iter().max().unwrap_or(0).max(1);
        let reads_text = params.get("text").is_some_and(|text| !text.is_null());
        let n_ctx = deepest + n_gen;
        MemoryNeed::Known(Workload { n_ctx, n_pass: deepest, n_logits: 1, n_gen, captures: false, reads_text })
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let recipe = context.recipe("model")?;
        let info = context.engine.inspect(&recipe)?;
        let (n_gen, depths) = (size(context.params, "n_gen"), sizes(context.params, "n_depth"));
        let deepest = depths.iter().copied().max().unwrap_or(0).max(1);
        if deepest + n_gen > info.n_ctx_max {
            return Err(too_long(&format!("n_depth {deepest} + n_gen {n_gen}"), deepest + n_gen, &info));
        }
        let tokens = tokens(context, &info, deepest)?;
        let plan = sample_plan(context);
        let mut model = context.models.acquire(&recipe, context.progress)?;
        model.reserve(deepest + n_gen)?;
        // Right before fast. The cache that it fills is emptied by the first prefill.
        let budget = decode_budget(info.compute_dtype, quantizes_activations(&recipe, &info));
        let check = check_decode(&mut **model, &tokens[..1], n_gen.min(CHECKED_POSITIONS), budget)?;
        let told = format!(
            "decode's logits are within {:.1e} of prefill's at {} positions, {budget:.0e} allowed",
            check.relative_error_max, check.n_positions
        );
        context.progress.note(Level::Debug, &told);
        // After loading: what quantizing took for a moment is not what running takes.
        let mut probe = context.engine.memory_probe();
        let mut watch = Watch::start(context, Threads::Calling);
        context.progress.begin(Some((depths.len() * (plan.warmup + plan.samples)) as u64), "sequences");
        let mut results: Vec<DecodeResult> = Vec::new();
        for n_depth in depths {
            let (prompt, label) = (&tokens[..n_depth.max(1)], decode_label(n_gen, n_depth));
            let mean_s = |sequences: &[Vec<f64>]| {
                sequences.iter().flatten().sum::<f64>() / sequences.iter().map(Vec::len).sum::<usize>() as f64
            };
            let mut case = watch.sample(&label, plan, mean_s, |counts, regions| {
                model.fill(prompt).map_err(|error| error.in_case(&label))?;
                if counts {
                    regions.begin();
                }
                let decoded = model.decode(n_gen).map_err(|error| error.in_case(&label));
                regions.end();
                Ok(decoded?.iter().map(|token| token.duration_s).collect::<Vec<f64>>())
            })?;
            watch.energy(&label, &mut case, n_gen, true, |work| {
                model.fill(prompt).map_err(|error| error.in_case(&label))?;
                if work == Work::Whole {
                    model.decode(n_gen).map_err(|error| error.in_case(&label))?;
                }
                Ok(())
            })?;
            probe.mark();
            let row = decode_result(n_gen, n_depth, &[case.samples]);
            results.extend(row.map(|row| DecodeResult { disturbance: Some(case.disturbance), ..row }));
        }
        let memory = probe.finish().of_model(model.weights_bytes(), model.kv_cache_bytes());
        let (watched, engine) = (watch.finish(), context.engine.info());
        let record = DecodeRecord {
            results,
            decode_check_n_positions: check.n_positions,
            decode_check_relative_error_max: check.relative_error_max,
            decode_check_budget: check.budget,
            common: BenchCommon {
                power: watched.power,
                n_other_processes: watched.others.map(|others| others.n),
                other_processes_bytes: watched.others.and_then(|others| others.bytes),
                memory,
                method: METHOD.to_owned(),
                clock: model.decode_clock().map_or(engine.clock, str::to_owned),
                engine: engine.backend,
                compute_dtype: model.info().compute_dtype,
            },
        };
        Ok(output(&record))
    }

    fn combine(&self, outputs: Vec<StageOutput>) -> Result<StageOutput, StageError> {
        let starts: Vec<DecodeRecord> = read_starts(outputs)?;
        let rows: Vec<Vec<DecodeResult>> = starts.iter().map(|start| start.results.clone()).collect();
        let common: Vec<&BenchCommon> = starts.iter().map(|start| &start.common).collect();
        let Some(first) = starts.first() else { return Ok(StageOutput::default()) };
        Ok(output(&DecodeRecord {
            results: combine_rows(&rows, combine_decodes)?,
            common: combine_common(&common)?,
            decode_check_relative_error_max: starts
                .iter()
                .map(|start| start.decode_check_relative_error_max)
                .fold(0.0, f64::max),
            ..first.clone()
        }))
    }
}

fn output(record: &DecodeRecord) -> StageOutput {
    let speeds = record.results.iter().map(|row| Speed {
        label: &row.label,
        tokens_per_second: row.tokens_per_second,
        low: row.tokens_per_second_low,
        high: row.tokens_per_second_high,
        starts: &row.starts,
        disturbance: row.disturbance.as_ref(),
    });
    bench_starts::output(record, &record.common, speeds, 1)
}

/// Returns true where a product quantizes what it is given, by this recipe or by the model's own files.
fn quantizes_activations(recipe: &ModelRecipe, info: &ModelInfo) -> bool {
    let of_config = recipe.quantization.as_ref().is_some_and(|config| {
        info.linears
            .iter()
            .filter_map(|(module, _)| config.scheme_for(module))
            .any(|spec| spec.outlier_threshold.is_some())
    });
    let stored = info.stored_quantization.iter().flat_map(|stored| &stored.schemes);
    of_config || stored.into_iter().any(|spec| spec.outlier_threshold.is_some())
}
