//! Layer analysis: `lbl_analysis.md`, its summary plot, and a scatter plot per module.

use super::Evidence;
use super::evidence::Diff;
use super::layer_findings::{Group, by_layer, by_op, furthest_first, is_linear};
use super::markdown::{Table, code};
use super::numbers::{decimals, significant, thousands};
use super::paths::Names;
use super::plot::{self, Canvas, PlotError};
use super::request::{ReportError, ReportFile, ScatterPoints};
use crate::artifact::ModuleDiff;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Rows of the table of modules furthest from the reference.
const N_RANKED: usize = 10;
/// Scatter plots shown in the text itself; the others are linked.
const N_SHOWN: usize = 3;

/// Where a diff's analysis stands in the report's folder.
pub struct LayerFiles {
    /// `lbl_analysis.md`, or in a folder of the stage's where there are several diffs.
    pub document: String,
    pub summary_image: String,
    pub files: Vec<ReportFile>,
}

/// Returns each diff's files, in the diffs' order.
///
/// # Errors
/// Scatter points that can't be read, a plot that can't be drawn.
pub fn layer_analyses(evidence: &Evidence<'_>) -> Result<Vec<LayerFiles>, ReportError> {
    let mut folders = Names::reserved(&["images"]);
    let is_single = evidence.diffs.len() == 1;
    let analyses = evidence.diffs.iter().map(|diff| {
        let folder = if is_single { String::new() } else { format!("{}/", folders.give(&diff.stage.address)) };
        layer_analysis(evidence, diff, &folder)
    });
    analyses.collect()
}

fn layer_analysis(evidence: &Evidence<'_>, diff: &Diff<'_>, folder: &str) -> Result<LayerFiles, ReportError> {
    let subtitle = format!(
        "{} against {} · {} diff over {} tokens",
        diff.candidate,
        diff.reference,
        diff.mode,
        token_range(&diff.rows)
    );
    let mut files = plot_files(&plot::summary(&diff.rows, &subtitle), &format!("{folder}images/summary"))?;
    let scatters = scatter_files(evidence, diff, folder)?;
    let links: BTreeMap<&str, String> =
        scatters.iter().map(|(module, file)| (module.as_str(), relative(&file.path, folder))).collect();
    let document = format!("{folder}lbl_analysis.md");
    files.push(ReportFile::text(&document, document_text(evidence, diff, &links)));
    files.extend(scatters.into_iter().map(|(_, file)| file));
    Ok(LayerFiles { document, summary_image: format!("{folder}images/summary.png"), files })
}

/// Returns a plot as `<stem>.png` and `<stem>.svg`.
///
/// # Errors
/// Where it can't be drawn.
pub fn plot_files(canvas: &Canvas, stem: &str) -> Result<Vec<ReportFile>, ReportError> {
    let path = |extension: &str| PathBuf::from(format!("{stem}.{extension}"));
    let failed = |extension: &'static str| move |source: PlotError| ReportError::Plot { path: path(extension), source };
    let png = canvas.to_png().map_err(failed("png"))?;
    let svg = canvas.to_svg().map_err(failed("svg"))?;
    Ok(vec![ReportFile { path: path("png"), bytes: png }, ReportFile::text(path("svg"), svg)])
}

/// Returns a scatter plot for each module that has points, in execution order.
fn scatter_files(
    evidence: &Evidence<'_>,
    diff: &Diff<'_>,
    folder: &str,
) -> Result<Vec<(String, ReportFile)>, ReportError> {
    let mut points: BTreeMap<String, ScatterPoints> = BTreeMap::new();
    evidence
        .request
        .scatter
        .read(diff.stage, &mut |module, pairs| {
            points.insert(module.to_owned(), pairs);
        })
        .map_err(|error| ReportError::Scatter { stage: diff.stage.address.clone(), reason: error.to_string() })?;
    let mut names = Names::reserved(&["summary", "ppl_vs_bytes"]);
    let mut jobs: Vec<(&ModuleDiff, ScatterPoints, PathBuf)> = Vec::new();
    for row in &diff.rows {
        if let Some(pairs) = points.remove(&row.module).filter(|pairs| !pairs.is_empty()) {
            jobs.push((row, pairs, PathBuf::from(format!("{folder}images/{}.png", names.give(&row.module)))));
        }
    }
    jobs.into_par_iter()
        .map(|(row, pairs, path)| match plot::scatter(row, &pairs, (&diff.reference, &diff.candidate)).to_png() {
            Ok(bytes) => Ok((row.module.clone(), ReportFile { path, bytes })),
            Err(source) => Err(ReportError::Plot { path, source }),
        })
        .collect()
}

fn relative(path: &Path, folder: &str) -> String {
    let text = path.to_string_lossy();
    text.strip_prefix(folder).unwrap_or(&text).to_owned()
}

fn document_text(evidence: &Evidence<'_>, diff: &Diff<'_>, links: &BTreeMap<&str, String>) -> String {
    let (candidate, reference) = (code(&diff.candidate), evidence.named(&diff.reference));
    let mut text = format!("# Layer analysis: {candidate} against {reference}\n\n");
    text.push_str(&introduction(diff));
    text.push_str(
        "\n[Summary](#summary) · [Furthest from the reference](#furthest-from-the-reference) · [By operation](#by-operation) · \
         [By layer](#by-layer) · \
         [All modules](#all-modules) · [How to read this](#how-to-read-this)\n",
    );
    text.push_str(
        "\n## Summary\n\n![Negative MSE and cosine similarity of every module in execution \
        order](images/summary.png)\n\n",
    );
    text.push_str(
        "The same as [SVG](images/summary.svg). Left axis: negative mean squared error, a decade a step; \
        right axis: cosine similarity. Higher is closer to the reference.\n",
    );
    text.push_str(&furthest(diff, links));
    text.push_str("\n## By operation\n\nIn execution order. Medians are over modules.\n\n");
    text.push_str(&groups(&by_op(&diff.rows), "operation"));
    let layers = by_layer(&diff.rows);
    text.push_str("\n## By layer\n\n");
    text.push_str(if layers.is_empty() {
        "No module belongs to a decoder layer.\n"
    } else {
        "Modules within the decoder's layers.\n\n"
    });
    if !layers.is_empty() {
        text.push_str(&groups(&layers, "layer"));
    }
    text.push_str("\n## All modules\n\nIn execution order.\n\n");
    text.push_str(&all_modules(diff, links));
    text.push_str(&legend(&diff.mode));
    text
}

fn introduction(diff: &Diff<'_>) -> String {
    let mode = match diff.mode.as_str() {
        "cumulative" => {
            "Both models ran whole, so what a module shows includes the errors of all modules before it".to_owned()
        }
        "isolated" => {
            "Each module of the candidate was fed the reference's input, so that it shows its own error alone"
                .to_owned()
        }
        other => format!("Mode `{other}`"),
    };
    let text_source = diff
        .stage
        .input("reference")
        .and_then(|capture| capture.record.head.params.get("text"))
        .and_then(|text| text.get("source"))
        .and_then(|source| source.as_str())
        .map(|source| format!(" of {}", code(source)))
        .unwrap_or_default();
    let n_linears = diff.rows.iter().filter(|row| is_linear(&row.op)).count();
    format!(
        "The same {} tokens{text_source} went through both models, and the outputs of {} modules ({} of them \
         linears) were compared value by value. {mode} (`{}`). Computed \
         by stage {} in run `{}`.\n",
        token_range(&diff.rows),
        thousands(diff.rows.len()),
        thousands(n_linears),
        diff.mode,
        code(&diff.stage.address),
        diff.stage.record.head.produced_by_run
    )
}

fn token_range(rows: &[ModuleDiff]) -> String {
    let min = rows.iter().map(|row| row.n_tokens).min().unwrap_or(0);
    let max = rows.iter().map(|row| row.n_tokens).max().unwrap_or(0);
    if min == max { thousands(max) } else { format!("{} to {}", thousands(min), thousands(max)) }
}

/// What a cumulative distance is, and is not.
const CUMULATIVE: &str = " Each figure is the distance of a module's output when all errors up to there act together. It is not the \
    module's sensitivity: a module that stands first may add no error of its own, and keeping it in a higher precision may gain little.";

fn furthest(diff: &Diff<'_>, links: &BTreeMap<&str, String>) -> String {
    let ranked = furthest_first(&diff.rows);
    let mut text =
        "\n## Furthest from the reference\n\nLinears by signal to noise (SQNR), lowest first; ties by cosine."
            .to_owned();
    if diff.mode == "cumulative" {
        text.push_str(CUMULATIVE);
    }
    text.push_str("\n\n");
    let mut table = Table::new([
        "rank",
        "module",
        "operation",
        "SQNR",
        "cosine",
        "cosine p01",
        "rel. error",
        "n tokens",
        "scatter",
    ]);
    for (idx, row) in ranked.iter().take(N_RANKED).enumerate() {
        table.row([
            (idx + 1).to_string(),
            code(&row.module),
            row.op.clone(),
            sqnr(row.sqnr_db, row.mse),
            decimals(row.cosine, 5),
            decimals(row.cosine_p01, 5),
            relative_error(row),
            thousands(row.n_tokens),
            link(links, row),
        ]);
    }
    text.push_str(&table.render());
    for row in ranked.iter().take(N_SHOWN) {
        if let Some(path) = links.get(row.module.as_str()) {
            text.push_str(&format!("\n![{}: reference against candidate]({path})\n", row.module));
        }
    }
    text
}

fn groups(groups: &[Group<'_>], name: &str) -> String {
    let mut table = Table::new([name, "n modules", "SQNR median", "cosine mean", "MSE max", "furthest", "its SQNR"]);
    for group in groups {
        table.row([
            group.name.clone(),
            thousands(group.n_modules),
            sqnr(group.sqnr_db_median, group.mse_max),
            decimals(group.cosine_mean, 5),
            significant(group.mse_max),
            code(&group.furthest.module),
            sqnr(group.furthest.sqnr_db, group.furthest.mse),
        ]);
    }
    table.render()
}

fn all_modules(diff: &Diff<'_>, links: &BTreeMap<&str, String>) -> String {
    let mut table = Table::new([
        "module",
        "layer",
        "operation",
        "n tokens",
        "MSE",
        "cosine",
        "cosine p01",
        "SQNR",
        "rel. error",
        "max |Δ|",
        "ref mean |x|",
        "ref max |x|",
        "scatter",
    ]);
    for row in &diff.rows {
        table.row([
            code(&row.module),
            row.layer_idx.map_or_else(|| "n/a".to_owned(), |layer_idx| layer_idx.to_string()),
            row.op.clone(),
            thousands(row.n_tokens),
            significant(row.mse),
            decimals(row.cosine, 6),
            decimals(row.cosine_p01, 6),
            sqnr(row.sqnr_db, row.mse),
            relative_error(row),
            significant(row.max_abs_diff),
            significant(row.ref_mean_abs),
            significant(row.ref_max_abs),
            link(links, row),
        ]);
    }
    table.render()
}

/// Formats an SQNR, given the MSE it belongs to: where that is 0 there is no noise to set it against.
pub fn sqnr(db: Option<f64>, mse: f64) -> String {
    match db {
        Some(db) => format!("{} dB", decimals(db, 2)),
        None if mse == 0.0 => "exact".to_owned(),
        None => "n/a".to_owned(),
    }
}

fn relative_error(row: &ModuleDiff) -> String {
    row.rel_frobenius.map_or_else(|| "n/a".to_owned(), |ratio| format!("{} %", decimals(ratio * 100.0, 3)))
}

fn link(links: &BTreeMap<&str, String>, row: &ModuleDiff) -> String {
    links.get(row.module.as_str()).map_or_else(|| "not kept".to_owned(), |path| format!("[plot]({path})"))
}

fn legend(mode: &str) -> String {
    format!(
        "\n## How to read this\n\n\
         Everything is computed in f64 over the module's output, {mode} mode, n tokens as each row says; values are \
         in the units of the activations.\n\n\
         - **MSE**: mean squared difference. Modules differ in scale, so compare it within one operation only.\n\
         - **cosine**: cosine similarity of the two outputs of a token, averaged over tokens; **p01** is its 1st \
         percentile. A pair of zero rows counts as 1, a zero row \
         against another as 0.\n\
         - **SQNR**: 10·log10(Σr²/Σ(r − c)²) in dB; exact where there is no difference, n/a where the reference is \
         all zeros.\n\
         - **rel. error**: ‖r − c‖/‖r‖ over all values (Frobenius norm).\n\
         - **max |Δ|**: the largest single difference; **ref mean |x|**, **ref max |x|**: the reference's own size.\n"
    )
}
