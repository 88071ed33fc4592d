//! `compare`: two runs' numbers side by side.

use super::args::{CompareArgs, Global};
use super::error::CliError;
use super::{check_run, print};
use crate::artifact::{FORMAT_VERSION, Key, PplRecord, Record, RecordError, TokenScores};
use crate::report::{self, Compared, Differences, Measure, Scored, SpeedBasis, Spreads, TokenSource, Verdict};
use crate::stage::StageInput;
use crate::store::{Part, Results, RunDir, Store, read_token_scores};
use crate::ui::table;
use crate::units::format_significant;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A run that was found.
struct Run {
    dir: RunDir,
    json: Value,
}

impl Run {
    fn id(&self) -> &str {
        self.json["run_id"].as_str().unwrap_or("?")
    }

    /// Returns the addresses of stages that have a result, in the order of execution.
    fn stages(&self) -> Vec<&str> {
        let stages = self.json["stages"].as_array().into_iter().flatten();
        let has_result = |stage: &&Value| ["done", "cached"].contains(&stage["outcome"].as_str().unwrap_or_default());
        stages.filter(has_result).filter_map(|stage| stage["stage"].as_str()).collect()
    }

    /// Returns the key of the `load` stage whose model a stage measured; `None` for a model that `quantize` made.
    fn loaded_model(&self, stage: &StageInput) -> Option<&str> {
        let name = stage.record.head.params.get("model")?.as_str()?;
        let cell = stage.address.find('[').map_or("", |at| &stage.address[at..]);
        let stages = self.json["stages"].as_array()?;
        let find = |address: &str| stages.iter().find(|stage| stage["stage"] == address);
        let model = find(name).or_else(|| find(&format!("{name}{cell}")))?;
        model["key"].as_str().filter(|_| model["kind"] == "load")
    }

    fn stage(&self, address: &str, cache: &Path) -> Result<Arc<StageInput>, CliError> {
        let record =
            Record::from_json(self.dir.record(address, &self.json)?).map_err(|error| unreadable(self, &error))?;
        Ok(Arc::new(StageInput {
            address: address.to_owned(),
            kind: record.head.kind.clone(),
            key: record.head.key.clone(),
            dir: cache.join(&record.head.key),
            record,
            inputs: BTreeMap::new(),
        }))
    }
}

/// Compares two runs.
pub fn compare(global: &Global, args: &CompareArgs) -> Result<u8, CliError> {
    let (a, b) = (find(global, &args.a)?, find(global, &args.b)?);
    let store = Store::open(&global.cache)?;
    let in_both: Vec<&str> = a.stages().into_iter().filter(|stage| b.stages().contains(stage)).collect();
    let mut circumstances = circumstances(&a, &b);
    let mut pairs = Vec::new();
    for address in &in_both {
        let (one, other) = (a.stage(address, store.dir())?, b.stage(address, store.dir())?);
        circumstances.extend(source_types(&one, &other)?);
        if one.kind == other.kind && one.kind != "report" {
            let measures = (measures_of(&a, &one)?, measures_of(&b, &other)?);
            pairs.push(Pair { a: one, b: other, measures });
        }
    }
    let find = |one: &Measure, other: &Measure| reference((&a, &b), &pairs, one, other);
    let all = pairs.iter().flat_map(|pair| pair.measures.0.iter().chain(&pair.measures.1));
    let basis = SpeedBasis { spreads: Spreads::of(all), reference: Some(&find) };
    let mut rows = Vec::new();
    for pair in &pairs {
        rows.extend(rows_of((&a, &b), pair, &basis, &store)?);
    }
    let only = |run: &Run, other: &Run| -> Vec<String> {
        run.stages().into_iter().filter(|stage| !other.stages().contains(stage)).map(str::to_owned).collect()
    };
    let found = Found { only_in_a: only(&a, &b), only_in_b: only(&b, &a), circumstances, rows };
    print(&if args.json { found.json(&a, &b) } else { found.text(&a, &b, args.all) })?;
    let differs = |row: &Compared| matches!(row.verdict, Verdict::OutsideNoise | Verdict::NotComparable);
    let is_different = found.rows.iter().any(differs) || !found.only_in_a.is_empty() || !found.only_in_b.is_empty();
    Ok(if args.fail_on_difference && (is_different || found.rows.is_empty()) { 5 } else { 0 })
}

/// Finds a run by its id, its folder, or `latest`.
fn find(global: &Global, name: &str) -> Result<Run, CliError> {
    let results = Results::new(&global.results);
    let as_path = PathBuf::from(name);
    let found = match name {
        "latest" => results.latest(),
        _ if as_path.join("run.json").is_file() => results.open(&as_path),
        _ => results.run(name),
    };
    let (dir, json) = found.map_err(|error| CliError::Usage {
        message: format!("failed to find run {name:?}: {error}"),
        hint: Some(format!("run ids are the folders in {}/<pipeline>/", global.results.display())),
    })?;
    check_run(&json, &dir.path)?;
    Ok(Run { dir, json })
}

/// Names the run of a record that can't be read.
fn unreadable(run: &Run, error: &RecordError) -> CliError {
    let hint = "a run of an earlier labpipe is compared after running its pipeline again".to_owned();
    CliError::Usage { message: format!("run {}: failed to {error}", run.id()), hint: Some(hint) }
}

/// A stage that both runs have.
struct Pair {
    a: Arc<StageInput>,
    b: Arc<StageInput>,
    measures: (Vec<Measure>, Vec<Measure>),
}

fn measures_of(run: &Run, stage: &Arc<StageInput>) -> Result<Vec<Measure>, CliError> {
    report::measures(stage).map_err(|error| match error {
        report::ReportError::Record(error) => unreadable(run, &error),
        other => CliError::Usage { message: format!("failed to {other}"), hint: None },
    })
}

/// Finds what ties two days together: the same figure of an unquantized model that each run measured together with what is compared.
fn reference<'p>(
    (run_a, run_b): (&Run, &Run),
    pairs: &'p [Pair],
    one: &Measure,
    other: &Measure,
) -> Option<(String, &'p Measure, &'p Measure)> {
    let is_same = |measure: &&Measure, of: &Measure| {
        let together = measure.starts.as_ref().zip(of.starts.as_ref()).is_some_and(|(its, own)| its.run == own.run);
        together && measure.metric == of.metric && measure.label == of.label
    };
    pairs.iter().filter(|pair| pair.a.address != one.stage).find_map(|pair| {
        let models = (run_a.loaded_model(&pair.a)?, run_b.loaded_model(&pair.b)?);
        let in_a = pair.measures.0.iter().find(|measure| is_same(measure, one))?;
        let in_b = pair.measures.1.iter().find(|measure| is_same(measure, other))?;
        (models.0 == models.1).then(|| (pair.a.address.clone(), in_a, in_b))
    })
}

fn rows_of(
    (run_a, run_b): (&Run, &Run),
    pair: &Pair,
    basis: &SpeedBasis<'_>,
    store: &Store,
) -> Result<Vec<Compared>, CliError> {
    let (a, b) = (&pair.a, &pair.b);
    let (same_subject, differences) = if a.kind == "ppl" {
        let record = |run, stage: &StageInput| -> Result<PplRecord, CliError> {
            stage.record.read().map_err(|error| unreadable(run, &error))
        };
        let (record_a, record_b) = (record(run_a, a)?, record(run_b, b)?);
        let scored_a = Scored { stage: a, record: &record_a };
        let scored_b = Scored { stage: b, record: &record_b };
        let tokens = CachedTokens { store };
        (report::is_same_text(&record_a, &record_b), report::paired_differences(scored_a, scored_b, &tokens))
    } else {
        (true, Differences::new())
    };
    let paired = |metric: &str, label: &str| differences.get(&(metric.to_owned(), label.to_owned())).cloned();
    Ok(report::compare(&pair.measures.0, &pair.measures.1, same_subject, &paired, basis))
}

/// Reads the single scores that a stage's artifact holds, where the cache still has it.
struct CachedTokens<'a> {
    store: &'a Store,
}

impl TokenSource for CachedTokens<'_> {
    fn read(&self, ppl: &StageInput, windows: &str) -> Option<TokenScores> {
        let key = Key(ppl.key.clone());
        // A damaged artifact counts as gone.
        self.store.check(&key, Part::All, &|| true)?;
        let artifact = self.store.get(&key)?;
        read_token_scores(&artifact.dir.join(format!("tokens-{windows}.parquet"))).ok()
    }
}

/// What two runs have in common and what not.
struct Found {
    only_in_a: Vec<String>,
    only_in_b: Vec<String>,
    /// What else changed: name, in A, in B.
    circumstances: Vec<(String, Value, Value)>,
    rows: Vec<Compared>,
}

impl Found {
    fn json(&self, a: &Run, b: &Run) -> String {
        let changed: Vec<Value> =
            self.circumstances.iter().map(|(name, a, b)| json!({ "name": name, "a": a, "b": b })).collect();
        let document = json!({
            "format_version": FORMAT_VERSION,
            "run_a": a.id(),
            "run_b": b.id(),
            "circumstances": changed,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "rows": self.rows,
        });
        serde_json::to_string_pretty(&document).unwrap_or_default()
    }

    fn text(&self, a: &Run, b: &Run, all: bool) -> String {
        let about = |run: &Run| {
            let field = |name: &str| run.json[name].as_str().unwrap_or("?").to_owned();
            let load = load_words(&run.json).map_or_else(String::new, |load| format!(", {load}"));
            format!("{} ({}, {}, {}{load})", run.id(), field("pipeline"), field("started_at"), field("device"))
        };
        let mut text = format!("A: {}\nB: {}\n", about(a), about(b));
        for (name, a, b) in &self.circumstances {
            text.push_str(&format!("{name}: {} -> {}\n", short(a), short(b)));
        }
        for (run, only) in [("A", &self.only_in_a), ("B", &self.only_in_b)] {
            if !only.is_empty() {
                text.push_str(&format!("only in {run}: {}\n", only.join(", ")));
            }
        }
        let is_shown = |row: &&Compared| all || (row.verdict != Verdict::Equal && !is_detail(row));
        let shown: Vec<&Compared> = self.rows.iter().filter(is_shown).collect();
        if !shown.is_empty() {
            text.push_str(&format!("\n{}\n", rows_table(&shown)));
        }
        for line in disturbances(&shown) {
            text.push_str(&format!("{line}\n"));
        }
        text.push_str(&format!("\n{}\n", self.closing(all)));
        text
    }

    fn closing(&self, all: bool) -> String {
        let count = |verdict| self.rows.iter().filter(|row| row.verdict == verdict).count();
        let mut text = format!(
            "{} numbers in both: {} equal, {} within noise, {} outside it, {} without a verdict, {} not comparable.",
            self.rows.len(),
            count(Verdict::Equal),
            count(Verdict::WithinNoise),
            count(Verdict::OutsideNoise),
            count(Verdict::UnknownNoise) + count(Verdict::TooFewStarts) + count(Verdict::OtherDay),
            count(Verdict::NotComparable)
        );
        match count(Verdict::TooFewBlocks) {
            0 => {}
            n => text.push_str(&format!(" {n} more rest on too few blocks of text for a verdict.")),
        }
        let n_details = self.rows.iter().filter(|row| row.verdict != Verdict::Equal && is_detail(row)).count();
        if !all && n_details > 0 {
            text.push_str(&format!(" {n_details} of single modules are not listed; --all does."));
        }
        if count(Verdict::OtherDay) > 0 {
            text.push_str(
                " Speeds of different days are judged where both runs also measured the same unquantized model: what else changed falls out \
                 then.",
            );
        }
        if count(Verdict::TooFewStarts) > 0 {
            text.push_str(" Speeds have a verdict from 8 degrees of freedom on: raise starts.");
        }
        text.push_str(
            " Noise: the 95 % interval of the difference, (p) from the same tokens in both runs, else as of independent samples; of scores from \
             blocks of text, of speeds from the spread between starts.",
        );
        text
    }
}

/// Numbers of single modules are many.
fn is_detail(row: &Compared) -> bool {
    row.label.starts_with("model.") || row.label == "lm_head"
}

fn rows_table(rows: &[&Compared]) -> String {
    let mut table = table(["stage", "metric", "A", "B", "B − A", "95 % interval", ""]);
    for row in rows {
        let label = if row.label == row.stage { String::new() } else { format!(" {}", row.label) };
        let pairing = if row.paired { " (p)" } else { "" };
        table.add_row([
            row.stage.clone(),
            format!("{}{label} ({})", row.metric, row.unit),
            format_significant(row.a),
            format_significant(row.b),
            format_significant(row.difference),
            row.low.zip(row.high).map_or_else(
                || "–".to_owned(),
                |(low, high)| format!("[{}, {}]{pairing}", format_significant(low), format_significant(high)),
            ),
            match (&row.disturbance_a, &row.disturbance_b) {
                (None, None) => verdict_words(row),
                _ => format!("{} (disturbed)", verdict_words(row)),
            },
        ]);
    }
    table.to_string()
}

fn verdict_words(row: &Compared) -> String {
    let relative_to = row.speed_ratio.as_ref().and_then(|ratio| ratio.relative_to.as_ref());
    let relative = relative_to.map_or_else(String::new, |stage| format!(", relative to {stage}"));
    format!("{}{relative}", row.verdict.words())
}

/// Returns what disturbed the measurements of either run that are shown, each once.
fn disturbances(rows: &[&Compared]) -> BTreeSet<String> {
    let of = |run: &str, row: &Compared, mark: &Option<String>| {
        mark.as_ref().map(|mark| format!("{run}: {} {} {mark}", row.stage, row.label))
    };
    rows.iter().flat_map(|row| [of("A", row, &row.disturbance_a), of("B", row, &row.disturbance_b)]).flatten().collect()
}

/// Returns what may explain differences: pipeline, options, program, machine.
fn circumstances(a: &Run, b: &Run) -> Vec<(String, Value, Value)> {
    const FIELDS: [&str; 14] = [
        "/pipeline",
        "/pipeline_blake3",
        "/set",
        "/matrix",
        "/device",
        "/environment/labpipe_version",
        "/environment/build/git_revision",
        "/environment/build/profile",
        "/environment/build/crates",
        "/environment/engine/backend",
        "/environment/engine/numerics_version",
        "/environment/kernel",
        "/environment/n_threads",
        "/environment/gpus",
    ];
    let field = |run: &Run, name: &str| run.json.pointer(name).cloned().unwrap_or(Value::Null);
    let changed = FIELDS.iter().map(|name| (*name, field(a, name), field(b, name))).filter(|(_, a, b)| a != b);
    let mut found: Vec<(String, Value, Value)> = changed
        .map(|(name, a, b)| (name.trim_start_matches("/environment").trim_start_matches('/').replace('/', "."), a, b))
        .collect();
    let files = |run: &Run| run.json["files"].as_object().cloned().unwrap_or_default();
    let (files_a, files_b) = (files(a), files(b));
    for (path, one) in &files_a {
        if let Some(other) = files_b.get(path).filter(|other| other["blake3"] != one["blake3"]) {
            found.push((path.clone(), one["blake3"].clone(), other["blake3"].clone()));
        }
    }
    found
}

/// Returns what the files of a loaded model store their weights as, where the two runs' files differ in it.
fn source_types(a: &StageInput, b: &StageInput) -> Result<Option<(String, Value, Value)>, CliError> {
    let words = |stage: &StageInput| {
        report::source_words(stage)
            .map_err(|error| CliError::Usage { message: format!("failed to {error}"), hint: None })
    };
    if a.kind != "load" || b.kind != "load" {
        return Ok(None);
    }
    let (one, other) = (words(a)?, words(b)?);
    Ok((one != other).then(|| (format!("{}: files store", a.address), json!(one), json!(other))))
}

/// Returns how busy the machine was before and after a run: `load 0.31 before, 1.98 after on 2 threads`.
fn load_words(run: &Value) -> Option<String> {
    let before = run.pointer("/environment/load_average_before")?.as_f64()?;
    let after = run["load_average_after"].as_f64().map_or_else(String::new, |after| format!(", {after:.2} after"));
    let n_threads = run.pointer("/environment/n_threads").and_then(Value::as_u64);
    let threads = n_threads.map_or_else(String::new, |n| format!(" on {n} threads"));
    Some(format!("load {before:.2} before{after}{threads}"))
}

fn short(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let is_hash = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.chars().take(if is_hash { 12 } else { 160 }).collect()
}
