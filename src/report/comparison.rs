//! The comparison table: a row for each model.

use super::Evidence;
use super::findings::perplexity_change;
use super::markdown::{Table, code, plain};
use super::measure::Measure;
use super::model::Model;
use super::numbers::{mib, significant, thousands, with_interval, with_spread};
use super::paired::AgainstBaseline;
use std::collections::BTreeSet;

const UNMEASURED: &str = "not measured";

/// Returns the table, and the notes that say how each of its columns was measured.
pub fn comparison(evidence: &Evidence<'_>) -> (Table, Vec<String>) {
    let has_cells = evidence.models.iter().any(|model| model.cell.is_some());
    let columns = Columns::of(evidence);
    let mut header: Vec<String> = Vec::new();
    if has_cells {
        header.push("cell".to_owned());
    }
    header.extend(["model", "file", "stored as", "memory", "weights", "bits/weight"].map(str::to_owned));
    header.extend(columns.prefill.iter().map(|label| format!("prefill {label} (tokens/s)")));
    header.extend(columns.decode.iter().map(|label| format!("decode {label} (tokens/s)")));
    header.extend(columns.energy.iter().map(|label| format!("energy {label} (J/token)")));
    header.extend(columns.perplexity.iter().map(|label| format!("perplexity {label}")));
    header.extend(columns.kl.iter().map(|label| format!("KL from base {label} (nats/token)")));
    let mut table = Table::new(header);
    for model in &evidence.models {
        let mut row: Vec<String> = Vec::new();
        if has_cells {
            row.push(model.cell.clone().unwrap_or_else(|| "all".to_owned()));
        }
        row.extend([code(&model.address), plain(&model.file_words()), model.scheme.clone()]);
        row.push(memory(evidence, model));
        row.push(evidence.weights_bytes(&model.address).map_or_else(|| UNMEASURED.to_owned(), mib));
        row.push(bits(evidence, model));
        row.extend(columns.cells(evidence, model));
        table.row(row);
    }
    (table, notes(evidence, &columns))
}

/// Labels by metric.
struct Columns<'a> {
    prefill: Vec<&'a str>,
    decode: Vec<&'a str>,
    energy: Vec<&'a str>,
    perplexity: Vec<&'a str>,
    kl: Vec<&'a str>,
}

impl<'a> Columns<'a> {
    fn of(evidence: &'a Evidence<'_>) -> Columns<'a> {
        Columns {
            prefill: evidence.labels("prefill_tokens_per_second"),
            decode: evidence.labels("decode_tokens_per_second"),
            energy: evidence.labels("energy_per_token_j"),
            perplexity: evidence.labels("perplexity"),
            kl: evidence.labels("kl_mean"),
        }
    }

    fn cells(&self, evidence: &Evidence<'_>, model: &Model) -> Vec<String> {
        let groups = [
            ("prefill_tokens_per_second", &self.prefill, "starts"),
            ("decode_tokens_per_second", &self.decode, "starts"),
            ("energy_per_token_j", &self.energy, "n"),
            ("perplexity", &self.perplexity, "n_scored"),
            ("kl_mean", &self.kl, "n_scored"),
        ];
        let mut cells = Vec::new();
        for (metric, labels, n_name) in groups {
            for label in labels {
                let found: Vec<&Measure> = evidence.measures_of(&model.address, metric, label).collect();
                let several = found.len() > 1;
                let texts: Vec<String> = found
                    .into_iter()
                    .map(|measure| {
                        let value = value_of(measure);
                        let stage = if several { format!(", {}", code(&measure.stage)) } else { String::new() };
                        let mark = if measure.disturbance.is_some() { " †" } else { "" };
                        let n = thousands(measure.n);
                        match (n_name, measure.n) {
                            ("starts", 1) => format!("{value} (1 start{stage}){mark}"),
                            ("starts", _) => format!("{value} ({n} starts{stage}){mark}"),
                            _ => format!("{value} ({n_name} = {n}{stage}){mark}"),
                        }
                    })
                    .collect();
                let mut texts = texts;
                if metric == "perplexity" {
                    let of_model = |one: &&AgainstBaseline| one.model == model.address && one.label == **label;
                    texts.extend(evidence.against.iter().filter(of_model).map(|pair| {
                        let kind = if pair.is_paired { "paired" } else { "unpaired" };
                        format!("{} against {}, {kind}", perplexity_change(pair), code(&pair.baseline))
                    }));
                }
                cells.push(if texts.is_empty() { UNMEASURED.to_owned() } else { texts.join("<br>") });
            }
        }
        cells
    }
}

/// Returns a measure's value with its interval; with its spread where it has none.
fn value_of(measure: &Measure) -> String {
    match measure.interval() {
        None => with_spread(measure.value, measure.spread),
        interval => with_interval(measure.value, interval),
    }
}

fn bits(evidence: &Evidence<'_>, model: &Model) -> String {
    let of = |label| evidence.measures_of(&model.address, "bits_per_weight", label).next();
    match (of("all parameters"), of("linears")) {
        (Some(all), Some(linears)) => format!("{} (linears {})", significant(all.value), significant(linears.value)),
        (Some(all), None) => significant(all.value),
        (None, Some(linears)) => format!("n/a (linears {})", significant(linears.value)),
        (None, None) => "n/a".to_owned(),
    }
}

/// Returns what it takes to run the model: the most of its measurements.
fn memory(evidence: &Evidence<'_>, model: &Model) -> String {
    let of_model = evidence.memories.iter().filter(|row| row.model == model.address);
    of_model.filter_map(|row| row.result.memory_bytes).max().map_or_else(|| UNMEASURED.to_owned(), mib)
}

fn notes(evidence: &Evidence<'_>, columns: &Columns<'_>) -> Vec<String> {
    let mut notes = vec![
        "File: what the model was loaded from, with the first digits of its blake3 (of a folder, of its files' names and hashes).".to_owned(),
        "Weights: bytes of parameters as stored, tied weights once (1 MiB = 2²⁰ bytes). Bits per weight: 8 · bytes / \
         parameters, over all \
         parameters; in brackets over the linears that `quantize` went through."
            .to_owned(),
    ];
    let methods: BTreeSet<&str> = evidence
        .memories
        .iter()
        .filter(|row| row.result.memory_bytes.is_some())
        .filter_map(|row| row.result.memory_method.as_deref())
        .collect();
    if !methods.is_empty() {
        let methods: Vec<&str> = methods.into_iter().collect();
        notes.push(format!(
            "Memory: what it takes to run the model, weights, cache and activations together; the highest over its speed \
             measurements, n = 1 each; parts under [Memory](#memory). How: {}.",
            methods.join("; ")
        ));
    }
    if !columns.prefill.is_empty() {
        notes.push(
            "Prefill: n_prompt / mean time to the first token's logits, with the 95 % interval from the spread between starts; `pp128` is a \
             prompt of 128 tokens."
                .to_owned(),
        );
    }
    if !columns.decode.is_empty() {
        notes.push(
            "Decode: 1 / mean token latency, with the 95 % interval from the spread between starts; `tg64 @ d256` is 64 tokens after 256 of \
             context."
                .to_owned(),
        );
    }
    if !columns.energy.is_empty() {
        notes.push(
            "Energy: mean ± standard deviation over n equal parts of a window of repeated work, what the device's board used / the \
             tokens of that work; how, and the clocks, under [Energy and clocks](#energy-and-clocks)."
                .to_owned(),
        );
    }
    if evidence.measures.iter().any(|measure| measure.disturbance.is_some()) {
        notes.push(
            "†: something else disturbed the measurement, or its first attempt: under \
             [Disturbed measurements](#disturbed-measurements)."
                .to_owned(),
        );
    }
    if !columns.perplexity.is_empty() {
        notes.push(
            "Perplexity: value [95 % interval] over n_scored tokens, from blocks of text, lower is better; the change against \
             the baseline has an interval of its own, paired where both scored the same tokens. `hf-strided 512/256` is \
             windows of 512 tokens that begin every 256."
                .to_owned(),
        );
    }
    if !columns.kl.is_empty() {
        notes.push(
            "KL from base: mean [95 % interval] of KL(base ‖ model) over n_scored tokens, from blocks of text; which model is the base, \
             and more of it, under [Divergence](#divergence)."
                .to_owned(),
        );
    }
    notes
}

#[cfg(test)]
mod tests {
    use crate::artifact::PowerResult;
    use crate::report::testing::{decode, load, rendered, text_of};
    use serde_json::json;
    use std::sync::Arc;

    #[test]
    fn a_disturbed_measurement_is_marked_and_explained() {
        let model = load("fp16");
        let mut stage = decode("decode", &model, 0.001, 1000);
        let seen = json!({
            "disturbed": null, "repeated": true, "host": null, "device": null,
            "discarded": { "disturbed": "others took 0.96 of 2 CPUs", "n_samples": 3, "sample_s_mean": 0.004 },
        });
        Arc::make_mut(&mut stage).record.body["results"][0]["disturbance"] = seen;
        let files = rendered(&[stage], &[], &["md", "csv"]).expect("a report");
        let (text, csv) = (text_of(&files, "report.md"), text_of(&files, "report.csv"));
        assert_eq!(text.matches(" † |").count(), 1, "one of two depths: {text}");
        let row = "| tg64 | measured again, at first disturbed: others took 0.96 of 2 CPUs | ";
        assert!(text.contains(row) && text.contains("| 4.00 ms |"), "{text}");
        assert!(csv.contains(",\"measured again, at first disturbed"), "{csv}");
    }

    #[test]
    fn energy_has_a_column_and_a_table_where_a_device_told_of_it() {
        let model = load("fp16");
        let mut stage = decode("decode", &model, 0.001, 1000);
        let power = PowerResult {
            label: "tg64".to_owned(),
            n_tokens: 192,
            energy_per_token_j: Some(1.5625),
            energy_per_token_j_stdev: Some(0.02),
            energy_n_windows: 10,
            energy_n_updates: 25,
            energy_n_tokens: 384,
            energy_window_s: Some(2.0),
            energy_j: Some(600.0),
            window_s: 0.25,
            power_w_mean: Some(300.0),
            power_limit_w: Some(700.0),
            sm_clock_mhz_min: Some(1755.0),
            sm_clock_mhz_median: Some(1980.0),
            n_samples: 20,
            throttle_reasons: vec!["sw_power_cap".to_owned()],
            energy_method: "counted by a test".to_owned(),
            ..PowerResult::default()
        };
        let body = &mut Arc::make_mut(&mut stage).record.body;
        body.insert("power".to_owned(), json!([power]));
        let files = rendered(&[stage.clone()], &[], &["md", "csv"]).expect("a report");
        let text = text_of(&files, "report.md");
        assert!(text.contains("| energy tg64 (J/token) |"), "{text}");
        assert!(text.contains("1.562 ± 0.020 (n = 10)"), "{text}");
        assert!(text.contains("300 W | 700 W | 1980 MHz (1755) | not told | 20 | sw_power_cap |"), "{text}");
        assert!(text.contains("Energy: counted by a test."), "{text}");
        Arc::make_mut(&mut stage).record.body.insert("power".to_owned(), json!(null));
        let files = rendered(&[stage], &[], &["md"]).expect("a report");
        assert!(!text_of(&files, "report.md").contains("nergy"));
    }
}
