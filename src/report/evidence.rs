//! Everything the inputs' records say, put side by side.

use super::markdown::code;
use super::measure::{Measure, Source};
use super::model::{Model, compared_models, measured_model};
use super::paired::{AgainstBaseline, against_baselines};
use super::request::{ReportError, ReportRequest};
use super::speeds::{Spreads, Starts, Work};
use crate::artifact::{
    BenchCommon, DecodeRecord, DecodeResult, DiffRecord, DivergenceResult, MemoryFigures, ModuleDiff, PowerResult,
    PplRecord, PplResult, PrefillRecord, PrefillResult, StartResult,
};
use crate::inference::{LoadRecord, QuantizeRecord};
use crate::stage::StageInput;
use std::collections::BTreeSet;
use std::sync::Arc;

/// One row of a record's `results`, and whose it is.
#[derive(Debug, Clone)]
pub struct Row<T> {
    pub stage: String,
    pub model: String,
    pub result: T,
}

/// A row of a benchmark with its single starts.
#[derive(Debug, Clone)]
pub struct Timed<T> {
    pub row: T,
    pub starts: Starts,
}

/// A `diff` record.
#[derive(Debug, Clone)]
pub struct Diff<'a> {
    pub stage: &'a StageInput,
    pub mode: String,
    /// Addresses of the models; the capture's own where its lineage is not known.
    pub reference: String,
    pub candidate: String,
    pub rows: Vec<ModuleDiff>,
}

/// A row of a `ppl` record's `divergence`.
#[derive(Debug, Clone)]
pub struct Diverged {
    /// Address of the base model; of the base stage where its lineage is not known.
    pub base: String,
    pub row: Row<DivergenceResult>,
}

/// What a report is written from.
pub struct Evidence<'a> {
    pub request: &'a ReportRequest<'a>,
    /// The request's inputs, each once.
    pub inputs: Vec<&'a Arc<StageInput>>,
    /// In order of first appearance, baselines first among those from one `load` stage.
    pub models: Vec<Model>,
    pub prefills: Vec<Row<Timed<PrefillResult>>>,
    pub decodes: Vec<Row<Timed<DecodeResult>>>,
    pub ppls: Vec<Row<PplResult>>,
    pub divergences: Vec<Diverged>,
    /// Perplexities against the baseline's.
    pub against: Vec<AgainstBaseline>,
    pub memories: Vec<Row<MemoryFigures>>,
    pub powers: Vec<Row<PowerResult>>,
    pub diffs: Vec<Diff<'a>>,
    /// Engines and clocks that benchmarks name.
    pub engines: BTreeSet<String>,
    pub clocks: BTreeSet<String>,
    pub measures: Vec<Measure>,
}

impl<'a> Evidence<'a> {
    /// Reads the request's records.
    ///
    /// # Errors
    /// [`ReportError::Record`] where one lacks what its kind promises.
    pub fn gather(request: &'a ReportRequest<'a>) -> Result<Evidence<'a>, ReportError> {
        let mut seen = BTreeSet::new();
        let inputs: Vec<&Arc<StageInput>> =
            request.inputs.iter().filter(|input| seen.insert(input.address.as_str())).collect();
        let mut evidence = Evidence {
            request,
            models: models_of(&inputs)?,
            inputs,
            prefills: Vec::new(),
            decodes: Vec::new(),
            ppls: Vec::new(),
            divergences: Vec::new(),
            against: Vec::new(),
            memories: Vec::new(),
            powers: Vec::new(),
            diffs: Vec::new(),
            engines: BTreeSet::new(),
            clocks: BTreeSet::new(),
            measures: Vec::new(),
        };
        for input in evidence.inputs.clone() {
            evidence.read(input)?;
        }
        evidence.measure();
        evidence.drop_unmeasured();
        evidence.measure_sources();
        evidence.against = against_baselines(&evidence);
        let against = evidence.against.iter().flat_map(Source::against_baseline);
        evidence.measures.extend(against.collect::<Vec<_>>());
        Ok(evidence)
    }

    fn read(&mut self, input: &'a StageInput) -> Result<(), ReportError> {
        match input.kind.as_str() {
            "prefill-bench" => {
                let record: PrefillRecord = input.record.read()?;
                self.add_bench(input, record.common);
                self.prefills.extend(rows(input, timed(input, Work::Prefill, record.results, |row| &row.starts)));
            }
            "decode-bench" => {
                let record: DecodeRecord = input.record.read()?;
                self.add_bench(input, record.common);
                self.decodes.extend(rows(input, timed(input, Work::Decode, record.results, |row| &row.starts)));
            }
            "ppl" => {
                let record: PplRecord = input.record.read()?;
                self.ppls.extend(rows(input, record.results));
                let base = base_address(input, record.base);
                let rows = rows(input, record.divergence.unwrap_or_default());
                self.divergences.extend(rows.map(|row| Diverged { base: base.clone(), row }));
            }
            "diff" => self.diffs.push(diff(input)?),
            "load" => self.add_weights(input, input.record.read::<LoadRecord>()?.weights_bytes),
            "quantize" => self.add_weights(input, input.record.read::<QuantizeRecord>()?.weights_bytes),
            _ => {}
        }
        Ok(())
    }

    fn add_bench(&mut self, input: &StageInput, common: BenchCommon) {
        self.memories.push(row(input, common.memory));
        self.powers.extend(rows(input, common.power.unwrap_or_default()));
        self.engines.insert(common.engine);
        self.clocks.insert(common.clock);
    }

    /// Notes the bytes of a model's weights; a record that does not have them leaves them unknown.
    fn add_weights(&mut self, input: &StageInput, weights_bytes: Option<u64>) {
        if weights_bytes.is_some() {
            self.memories.push(row(input, MemoryFigures { weights_bytes, ..MemoryFigures::default() }));
        }
    }

    /// Forgets models of which nothing was measured (a sweep's reference capture names one), unless that leaves none.
    fn drop_unmeasured(&mut self) {
        let measures = &self.measures;
        let is_measured = |model: &Model| measures.iter().any(|measure| measure.model == model.address);
        if self.models.iter().any(is_measured) {
            self.models.retain(is_measured);
        }
    }

    fn measure(&mut self) {
        let mut measures = Vec::new();
        for model in &self.models {
            let source = Source { model: &model.address, stage: &model.address };
            if let Some((bytes, n_params)) = model.linears() {
                measures.push(source.bits_per_weight("linears", bytes, n_params));
            }
            if let (Some(bytes), Some(n_params)) =
                (self.weights_bytes(&model.address), model.n_params.filter(|n| *n > 0))
            {
                measures.push(source.bits_per_weight("all parameters", bytes, n_params));
            }
        }
        measures.extend(self.memories.iter().flat_map(|row| row.source().memory(&row.result)));
        measures.extend(self.prefills.iter().flat_map(|row| row.source().prefill(&row.result.row, &row.result.starts)));
        measures.extend(self.decodes.iter().flat_map(|row| row.source().decode(&row.result.row, &row.result.starts)));
        measures.extend(self.powers.iter().filter_map(|row| row.source().energy(&row.result)));
        measures.extend(self.ppls.iter().flat_map(|row| row.source().ppl(&row.result, &self.ppl_label(&row.result))));
        for diverged in &self.divergences {
            let row = &diverged.row;
            let label = window_label(&row.result.convention, row.result.max_length, row.result.stride);
            measures.extend(row.source().divergence(&row.result, &label, &diverged.base));
        }
        for diff in &self.diffs {
            let source = Source { model: &diff.candidate, stage: &diff.stage.address };
            measures.extend(diff.rows.iter().flat_map(|row| source.module_diff(row, &diff.mode)));
        }
        self.measures = measures;
        let spreads = Spreads::of(self.measures.iter());
        let intervals: Vec<Option<(f64, f64)>> =
            self.measures.iter().map(|measure| spreads.interval(measure.starts.as_ref()?)).collect();
        for (measure, interval) in self.measures.iter_mut().zip(intervals) {
            if measure.starts.is_some() {
                measure.with_interval(interval);
            }
        }
    }

    /// Adds what the models' files hold; after unmeasured models are gone, for it is known of every model.
    fn measure_sources(&mut self) {
        let mut measures = Vec::new();
        for model in &self.models {
            let source = Source { model: &model.address, stage: &model.loaded_by };
            measures.extend(model.source_types.iter().map(|stored| source.source_bytes(stored)));
        }
        self.measures.extend(measures);
    }

    /// Returns what names a perplexity: convention and window, and the text where there are several.
    pub fn ppl_label(&self, row: &PplResult) -> String {
        let several_texts = self.ppls.iter().any(|other| other.result.text_hash != row.text_hash);
        let text = if several_texts { format!(", text {}", short_hash(&row.text_hash)) } else { String::new() };
        format!("{}{text}", window_label(&row.convention, row.max_length, row.stride))
    }

    /// Returns the bytes of a model's parameters as stored, as any of its records has them.
    pub fn weights_bytes(&self, model: &str) -> Option<u64> {
        self.memories.iter().filter(|row| row.model == model).find_map(|row| row.result.weights_bytes)
    }

    /// Returns the measures of a model under a metric and label.
    pub fn measures_of<'e>(
        &'e self,
        model: &'e str,
        metric: &'e str,
        label: &'e str,
    ) -> impl Iterator<Item = &'e Measure> {
        self.measures
            .iter()
            .filter(move |measure| measure.model == model && measure.metric == metric && measure.label == label)
    }

    /// Returns the labels that a metric has, in order of first appearance.
    pub fn labels(&self, metric: &str) -> Vec<&str> {
        let mut labels: Vec<&str> = Vec::new();
        for measure in self.measures.iter().filter(|measure| measure.metric == metric) {
            if !labels.contains(&measure.label.as_str()) {
                labels.push(&measure.label);
            }
        }
        labels
    }

    /// Returns a model's name as Markdown, and how its files store it where that is quantized already: wherever a baseline is named,
    /// a reader sees that it is no unquantized one.
    pub fn named(&self, address: &str) -> String {
        let model = self.models.iter().find(|model| model.address == address);
        let source = model.filter(|model| !model.is_quantized).and_then(Model::lossy_source);
        match source {
            Some(source) => format!("{} (from {source})", code(address)),
            None => code(address),
        }
    }

    /// Returns what a quantized model is held against: an unquantized one from the same `load` stage that something
    /// was measured of, the `load` stage itself first.
    pub fn baseline_of(&self, model: &Model) -> Option<&Model> {
        let candidates = || {
            self.models.iter().filter(|other| {
                !other.is_quantized && other.address != model.address && other.loaded_by == model.loaded_by
            })
        };
        let is_measured = |other: &&Model| {
            let compared = ["decode_tokens_per_second", "prefill_tokens_per_second", "perplexity", "weights_bytes"];
            self.measures.iter().any(|one| one.model == other.address && compared.contains(&one.metric))
        };
        if !model.is_quantized {
            return None;
        }
        candidates()
            .filter(is_measured)
            .find(|other| other.address == other.loaded_by)
            .or_else(|| candidates().find(is_measured))
    }
}

impl<T> Row<T> {
    fn source(&self) -> Source<'_> {
        Source { model: &self.model, stage: &self.stage }
    }
}

/// Returns what names a convention's windows: `hf-strided 512/256`; `llama-cpp 512` where there is no stride to choose.
pub fn window_label(convention: &str, max_length: usize, stride: usize) -> String {
    match convention {
        "llama-cpp" | "lm-eval" => format!("{convention} {max_length}"),
        _ => format!("{convention} {max_length}/{stride}"),
    }
}

/// Returns the first 12 digits of a hash.
pub fn short_hash(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

fn models_of(inputs: &[&Arc<StageInput>]) -> Result<Vec<Model>, ReportError> {
    let mut models: Vec<Model> = Vec::new();
    for input in inputs {
        let named = match input.kind.as_str() {
            "diff" => {
                let (reference, candidate) = compared_models(input);
                vec![reference, candidate]
            }
            _ => vec![measured_model(input)],
        };
        for stage in named.into_iter().flatten() {
            if models.iter().all(|model| model.address != stage.address) {
                models.push(Model::read(stage)?);
            }
        }
    }
    // Stable: models keep their order of appearance otherwise.
    models.sort_by_key(|model| model.is_quantized);
    Ok(models)
}

fn row<T>(input: &StageInput, result: T) -> Row<T> {
    Row { stage: input.address.clone(), model: model_address(input), result }
}

fn rows<T>(input: &StageInput, results: Vec<T>) -> impl Iterator<Item = Row<T>> {
    let (stage, model) = (input.address.clone(), model_address(input));
    results.into_iter().map(move |result| Row { stage: stage.clone(), model: model.clone(), result })
}

fn timed<T>(input: &StageInput, work: Work, rows: Vec<T>, starts: fn(&T) -> &Vec<StartResult>) -> Vec<Timed<T>> {
    let timed = |row: T| {
        let starts = Starts::new(input, work, starts(&row));
        Timed { row, starts }
    };
    rows.into_iter().map(timed).collect()
}

fn diff(input: &StageInput) -> Result<Diff<'_>, ReportError> {
    let record: DiffRecord = input.record.read()?;
    let (reference, candidate) = compared_models(input);
    let name = |model: Option<&StageInput>, param: &str| {
        let capture = input.input(param).map(|capture| capture.address.clone());
        model.map(|model| model.address.clone()).or(capture).unwrap_or_else(|| param.to_owned())
    };
    Ok(Diff {
        stage: input,
        mode: record.mode,
        reference: name(reference, "reference"),
        candidate: name(candidate, "candidate"),
        rows: record.modules,
    })
}

/// Returns the address of the model that a `ppl` stage was held against.
fn base_address(input: &StageInput, named: Option<String>) -> String {
    let model = input.input("base").and_then(|base| base.input("model")).map(|model| model.address.clone());
    model.or(named).unwrap_or_else(|| "its base".to_owned())
}

fn model_address(input: &StageInput) -> String {
    measured_model(input).map_or_else(|| input.address.clone(), |model| model.address.clone())
}
