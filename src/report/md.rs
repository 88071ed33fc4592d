//! `report.md`, with layer analyses and plots beside it.

use super::comparison::comparison;
use super::details::sections;
use super::findings::paragraph;
use super::layer_findings::furthest_first;
use super::layers::{LayerFiles, layer_analyses, plot_files, sqnr};
use super::markdown::{Table, code, listed, plain};
use super::numbers::{decimals, thousands};
use super::plot::{FrontierPoint, frontier};
use super::request::{ReportError, ReportFile};
use super::{Evidence, Exporter};
use crate::units::format_seconds;
use std::collections::{BTreeMap, BTreeSet};

pub const EXPORTER: Exporter = Exporter { name: "md", export };

/// Most stages named in a sentence.
const N_NAMED: usize = 6;
const FRONTIER: &str = "images/ppl_vs_bytes";

/// The plot of perplexity against bytes.
struct Frontier {
    files: Vec<ReportFile>,
    /// Models whose perplexity has no place on an axis.
    left_out: Vec<String>,
}

fn export(evidence: &Evidence<'_>) -> Result<Vec<ReportFile>, ReportError> {
    let layers = layer_analyses(evidence)?;
    let frontier = frontier_plot(evidence)?;
    let text = document(evidence, &layers, frontier.as_ref());
    let mut files = vec![ReportFile::text("report.md", text)];
    files.extend(frontier.map(|frontier| frontier.files).unwrap_or_default());
    files.extend(layers.into_iter().flat_map(|layer| layer.files));
    Ok(files)
}

fn document(evidence: &Evidence<'_>, layers: &[LayerFiles], frontier: Option<&Frontier>) -> String {
    let details = sections(evidence);
    let mut headings = vec!["Models"];
    headings.extend((!layers.is_empty()).then_some("Layer analysis"));
    headings.extend(details.iter().map(|section| section.heading));
    headings.push("Inputs");

    let mut text =
        format!("# {}\n\n{}\n\n{}\n", plain(evidence.request.title), paragraph(evidence), environment(evidence));
    let links: Vec<String> = headings.iter().map(|heading| format!("[{heading}](#{})", anchor(heading))).collect();
    text.push_str(&format!("\n{}\n", links.join(" · ")));
    text.push_str(&models(evidence, frontier));
    if !layers.is_empty() {
        text.push_str(&layer_section(evidence, layers));
    }
    for section in &details {
        text.push_str(&format!("\n## {}\n\n{}", section.heading, section.text));
    }
    text.push_str(&inputs(evidence));
    text
}

/// Returns the anchor that Markdown viewers give to a heading of letters and spaces.
fn anchor(heading: &str) -> String {
    heading.to_lowercase().replace(' ', "-")
}

/// Returns who computed the numbers, and in which run.
fn environment(evidence: &Evidence<'_>) -> String {
    let mut devices = BTreeSet::new();
    let mut runs: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for input in &evidence.inputs {
        let head = &input.record.head;
        devices.extend(head.device.as_deref());
        runs.entry(&head.produced_by_run).or_default().push(code(&input.address));
    }
    let join = |words: BTreeSet<&str>| words.into_iter().collect::<Vec<_>>().join("; ");
    let mut parts = vec![format!("Pipeline: {}", code(evidence.request.pipeline))];
    if !devices.is_empty() {
        parts.push(format!("device: {}", join(devices)));
    }
    for (what, names) in [("engine", &evidence.engines), ("clock", &evidence.clocks)] {
        if !names.is_empty() {
            parts.push(format!("{what}: {}", join(names.iter().map(String::as_str).collect())));
        }
    }
    let runs: Vec<String> = match runs.len() {
        0 => Vec::new(),
        1 => runs.into_keys().map(|run| format!("all from run `{run}`")).collect(),
        _ => runs.into_iter().map(|(run, stages)| format!("run `{run}`: {}", few(&stages))).collect(),
    };
    if !runs.is_empty() {
        parts.push(format!("results: {}", runs.join("; ")));
    }
    format!("{}.", parts.join(" · "))
}

/// Lists stages while they are few; of many it says how many, for the table of inputs has them all.
fn few(stages: &[String]) -> String {
    if stages.len() <= N_NAMED {
        listed(stages)
    } else {
        format!("{} stages (see [Inputs](#inputs))", thousands(stages.len()))
    }
}

fn models(evidence: &Evidence<'_>, frontier: Option<&Frontier>) -> String {
    let (table, notes) = comparison(evidence);
    let mut text = "\n## Models\n\n".to_owned();
    if table.is_empty() {
        text.push_str("No input names a model.\n");
        return text;
    }
    text.push_str(&table.render());
    text.push('\n');
    for note in notes {
        text.push_str(&format!("- {note}\n"));
    }
    if let Some(frontier) = frontier {
        let left_out = match frontier.left_out.as_slice() {
            [] => String::new(),
            some => format!(" Left out, because their perplexity is not finite: {}.", few(some)),
        };
        text.push_str(&format!(
            "\n![Perplexity against the bytes of the weights]({FRONTIER}.png)\n\nThe same as [SVG]({FRONTIER}.svg).{left_out}\n"
        ));
    }
    text
}

/// Draws perplexity against bytes, where at least two models have both under one label: the label most models have.
fn frontier_plot(evidence: &Evidence<'_>) -> Result<Option<Frontier>, ReportError> {
    let points_of = |label: &str| -> Vec<FrontierPoint> {
        let point = |model: &super::model::Model| {
            let measure = evidence.measures_of(&model.address, "perplexity", label).next()?;
            if !measure.value.is_finite() {
                return None;
            }
            let bytes = evidence.weights_bytes(&model.address)?;
            Some(FrontierPoint {
                label: model.name(),
                weights_mib: bytes as f64 / (1024.0 * 1024.0),
                perplexity: measure.value,
                ends: measure.low.zip(measure.high).filter(|(low, high)| low.is_finite() && high.is_finite()),
                is_baseline: !model.is_quantized,
            })
        };
        evidence.models.iter().filter_map(point).collect()
    };
    let mut best: Option<(&str, Vec<FrontierPoint>)> = None;
    for label in evidence.labels("perplexity") {
        let points = points_of(label);
        if best.as_ref().is_none_or(|(_, most)| points.len() > most.len()) {
            best = Some((label, points));
        }
    }
    let Some((label, points)) = best.filter(|(_, points)| points.len() >= 2) else {
        return Ok(None);
    };
    let n_scored: BTreeSet<usize> = evidence
        .measures
        .iter()
        .filter(|one| one.metric == "perplexity" && one.label == label)
        .map(|one| one.n)
        .collect();
    let n_scored: Vec<String> = n_scored.into_iter().map(thousands).collect();
    let subtitle = format!("{} models · {label} · {} tokens scored", points.len(), n_scored.join(" or "));
    let is_left_out =
        |one: &&super::measure::Measure| one.metric == "perplexity" && one.label == label && !one.value.is_finite();
    let left_out: BTreeSet<String> = evidence.measures.iter().filter(is_left_out).map(|one| code(&one.model)).collect();
    let files = plot_files(&frontier(&points, &subtitle), FRONTIER)?;
    Ok(Some(Frontier { files, left_out: left_out.into_iter().collect() }))
}

fn layer_section(evidence: &Evidence<'_>, layers: &[LayerFiles]) -> String {
    let mut text = "\n## Layer analysis\n\nThe linear module whose output is furthest from the reference's, by \
        signal to noise (SQNR), and where to read more. In cumulative mode it shows where all errors so far act together, not which \
        module causes them.\n\n"
        .to_owned();
    let mut table = Table::new([
        "diff",
        "candidate",
        "reference",
        "modules",
        "furthest linear",
        "SQNR",
        "cosine",
        "n tokens",
        "analysis",
    ]);
    for (diff, files) in evidence.diffs.iter().zip(layers) {
        let ranked = furthest_first(&diff.rows);
        let worst = ranked.first();
        table.row([
            code(&diff.stage.address),
            code(&diff.candidate),
            evidence.named(&diff.reference),
            thousands(diff.rows.len()),
            worst.map_or_else(|| "n/a".to_owned(), |row| code(&row.module)),
            worst.map_or_else(|| "n/a".to_owned(), |row| sqnr(row.sqnr_db, row.mse)),
            worst.map_or_else(|| "n/a".to_owned(), |row| decimals(row.cosine, 5)),
            worst.map_or_else(|| "n/a".to_owned(), |row| thousands(row.n_tokens)),
            format!("[lbl_analysis.md]({})", files.document),
        ]);
    }
    text.push_str(&table.render());
    if let [only] = layers {
        text.push_str(&format!("\n![Negative MSE and cosine similarity of every module]({})\n", only.summary_image));
    }
    text
}

fn inputs(evidence: &Evidence<'_>) -> String {
    let mut text = "\n## Inputs\n\n".to_owned();
    let mut table = Table::new(["stage", "kind", "computed in run", "started (UTC)", "took", "device", "key"]);
    for input in &evidence.inputs {
        let head = &input.record.head;
        table.row([
            code(&input.address),
            input.kind.clone(),
            code(&head.produced_by_run),
            code(&head.started_at),
            format_seconds(head.duration_s),
            head.device.clone().unwrap_or_else(|| "n/a".to_owned()),
            code(super::evidence::short_hash(&input.key)),
        ]);
    }
    text.push_str(&if table.is_empty() { "None.\n".to_owned() } else { table.render() });
    if !evidence.request.missing.is_empty() {
        text.push_str("\nMissing, because they failed or were skipped:\n\n");
        for address in evidence.request.missing {
            text.push_str(&format!("- {}\n", code(address)));
        }
    }
    text
}
