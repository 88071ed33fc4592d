//! What a report is asked for, and what comes back.

use super::paired::TokenSource;
use super::plot::PlotError;
use super::{EXPORTERS, Evidence};
use crate::artifact::RecordError;
use crate::stage::StageInput;
use std::path::PathBuf;
use std::sync::Arc;

/// `(reference, candidate)` values of one module.
pub type ScatterPoints = Vec<(f32, f32)>;

/// What went wrong in a [`ScatterSource`].
pub type ScatterFailure = Box<dyn std::error::Error + Send + Sync>;

/// Where the points of scatter plots come from: what a `diff` stage kept beside its record.
pub trait ScatterSource: Sync {
    /// Hands over each module's `(reference, candidate)` pairs, module by module; modules without points are left out.
    ///
    /// # Errors
    /// Whatever kept it from reading them, in words.
    fn read(&self, diff: &StageInput, take: &mut dyn FnMut(&str, ScatterPoints)) -> Result<(), ScatterFailure>;
}

/// No scatter plots.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoScatter;

impl ScatterSource for NoScatter {
    fn read(&self, _diff: &StageInput, _take: &mut dyn FnMut(&str, ScatterPoints)) -> Result<(), ScatterFailure> {
        Ok(())
    }
}

/// What a report is made of.
pub struct ReportRequest<'a> {
    pub title: &'a str,
    pub pipeline: &'a str,
    /// Stages to report on, with their lineage; order is kept, a stage named twice counts once.
    pub inputs: &'a [Arc<StageInput>],
    /// Addresses of inputs that failed or were skipped.
    pub missing: &'a [String],
    /// Names of exporters; see [`formats`].
    pub formats: &'a [String],
    pub scatter: &'a dyn ScatterSource,
    /// For comparisons token by token.
    pub tokens: &'a dyn TokenSource,
}

/// A file of a report.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportFile {
    /// Relative to the report's folder.
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

impl ReportFile {
    /// Returns a text file.
    pub fn text(path: impl Into<PathBuf>, text: String) -> ReportFile {
        ReportFile { path: path.into(), bytes: text.into_bytes() }
    }
}

/// Why a report could not be made. The text fits "failed to {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    #[error("write format {found:?}: labpipe knows {known}")]
    Format { found: String, known: String },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("read the scatter points of {stage}: {reason}; run the stage again with --force")]
    Scatter { stage: String, reason: String },
    #[error("make {}: {source}", path.display())]
    Plot { path: PathBuf, source: PlotError },
    #[error("encode {}: {reason}", path.display())]
    Encode { path: PathBuf, reason: String },
}

/// Returns the names of all report formats.
pub fn formats() -> Vec<&'static str> {
    EXPORTERS.iter().map(|exporter| exporter.name).collect()
}

/// Makes a report's files. The same request gives the same bytes.
///
/// # Errors
/// An unknown format, a record without its contract's fields, scatter points that can't be read, a plot that can't be
/// drawn.
pub fn render(request: &ReportRequest<'_>) -> Result<Vec<ReportFile>, ReportError> {
    let mut exporters = Vec::new();
    for name in request.formats {
        let exporter = EXPORTERS.iter().find(|exporter| exporter.name == name);
        exporters
            .push(exporter.ok_or_else(|| ReportError::Format { found: name.clone(), known: formats().join(", ") })?);
    }
    let evidence = Evidence::gather(request)?;
    let mut files = Vec::new();
    for (idx, exporter) in exporters.iter().enumerate() {
        if exporters[..idx].iter().all(|earlier| earlier.name != exporter.name) {
            files.extend((exporter.export)(&evidence)?);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use crate::artifact::{BlockInterval, PplResult, RecordBody};
    use crate::report::testing::{
        decode, diff, input, interval, load, load_of_blocks, ppl, ppl_record, ppl_row, quantize, rendered, text_of,
        two_models,
    };
    use serde_json::json;

    #[test]
    fn the_report_of_two_models() {
        let files = rendered(&two_models(1), &["ppl-int8".to_owned()], &["md", "csv"]).unwrap();
        insta::assert_snapshot!("report_md", text_of(&files, "report.md"));
        insta::assert_snapshot!("lbl_analysis_md", text_of(&files, "lbl_analysis.md"));
        insta::assert_snapshot!("report_csv", text_of(&files, "report.csv"));
    }

    #[test]
    fn links_name_files_that_are_there_and_plots_are_pngs() {
        let files = rendered(&two_models(1), &[], &["md"]).unwrap();
        let paths: Vec<String> = files.iter().map(|file| file.path.to_string_lossy().into_owned()).collect();
        for document in ["report.md", "lbl_analysis.md"] {
            let links = text_of(&files, document).split("](").skip(1).filter_map(|rest| rest.split(')').next());
            for link in links.filter(|link| !link.starts_with('#')) {
                assert!(paths.iter().any(|path| path == link), "{document} names {link}");
            }
        }
        for file in files.iter().filter(|file| file.path.extension().is_some_and(|extension| extension == "png")) {
            assert_eq!(&file.bytes[..8], b"\x89PNG\r\n\x1a\n", "{}", file.path.display());
        }
        let scatter = files.iter().find(|file| file.path.ends_with("images/lm_head.png")).unwrap();
        assert_eq!(
            scatter.bytes[16..24],
            [
                0,
                0,
                840u16.to_be_bytes()[0],
                840u16.to_be_bytes()[1],
                0,
                0,
                900u16.to_be_bytes()[0],
                900u16.to_be_bytes()[1]
            ]
        );
    }

    #[test]
    fn the_same_request_gives_the_same_bytes() {
        let formats = ["json", "csv", "md"];
        let twice = [(); 2].map(|()| rendered(&two_models(0), &[], &formats).unwrap());
        assert_eq!(twice[0], twice[1]);
        let document: serde_json::Value = serde_json::from_str(text_of(&twice[0], "report.json")).unwrap();
        assert_eq!(document["format_version"], 1);
        assert_eq!(document["records"].as_array().map(Vec::len), Some(7));
        assert_eq!(document["models"][1]["baseline"], "fp16");
    }

    #[test]
    fn cells_share_one_table_and_one_plot_and_diffs_have_a_folder_each() {
        let base = load("base");
        let mut inputs = Vec::new();
        for (config, scheme, bytes, perplexity) in [
            ("fp16", None, 520_064, 9.06),
            ("int8", Some(("int8", None)), 265_000, 9.07),
            ("nf4", Some(("nf4", Some(64))), 161_220, 11.42),
            ("int4", Some(("int4", Some(128))), 157_000, 12.9),
            ("mixed", Some(("nf4", Some(64))), 190_000, 10.1),
        ] {
            let model = quantize(&format!("quantized[config={config}]"), &base, scheme, bytes / 40);
            inputs.push(decode(&format!("decode[config={config}]"), &model, 0.001, bytes));
            inputs.push(ppl(&format!("ppl[config={config}]"), &model, perplexity));
            if bytes < 180_000 {
                inputs.push(diff(&format!("diff[config={config}]"), &base, &model, 0));
            }
        }
        let files = rendered(&inputs, &["ppl[config=broken]".to_owned()], &["md"]).unwrap();
        let report = text_of(&files, "report.md");
        for part in [
            "| config=int8 | `quantized[config=int8]` | x abababab | int8 |",
            "The smallest is `quantized[config=int4]`",
            "Perplexity changes least with `quantized[config=int8]` (+0.1 % [",
            "[lbl_analysis.md](diff-config=nf4/lbl_analysis.md)",
            "- `ppl[config=broken]`",
        ] {
            assert!(report.contains(part), "{part} in\n{report}");
        }
        for path in ["images/ppl_vs_bytes.png", "images/ppl_vs_bytes.svg", "diff-config=int4/images/summary.png"] {
            assert!(files.iter().any(|file| file.path.as_os_str() == path), "{path}");
        }
    }

    #[test]
    fn what_was_not_measured_is_said_and_never_filled_in() {
        let fp16 = load("fp16");
        let files = rendered(&[ppl("ppl", &fp16, 9.0)], &[], &["md"]).unwrap();
        let report = text_of(&files, "report.md");
        assert!(
            report.contains(
                "| `fp16` | x abababab | f16 | not measured | not measured | n/a | 9.000 [8.630, 9.386] (n_scored = 9,612) |"
            ),
            "{report}"
        );
        assert!(!files.iter().any(|file| file.path.starts_with("images")));
    }

    #[test]
    fn a_baseline_that_its_file_holds_quantized_is_never_called_by_its_dtype_alone() {
        let base = load_of_blocks("base");
        let nf4 = quantize("nf4", &base, Some(("nf4", Some(64))), 6_200);
        let inputs = [ppl("ppl-base", &base, 9.0), ppl("ppl-nf4", &nf4, 11.4), diff("diff", &base, &nf4, 1)];
        let files = rendered(&inputs, &[], &["md", "csv", "json"]).unwrap();
        let report = text_of(&files, "report.md");
        for part in [
            "`base` (f32 from Q4_1 89 %, f32 11 %)",
            "`base` is no unquantized baseline: its file holds quantized weights",
            "Against `base` (from Q4_1 89 %, f32 11 %), `nf4` has",
            "| `diff` | `nf4` | `base` (from Q4_1 89 %, f32 11 %) |",
            "| `base` | x.gguf abababab | f32 from Q4_1 89 %, f32 11 % |",
            "| `nf4` | x abababab | nf4, block 64, from Q4_1 89 %, f32 11 % |",
        ] {
            assert!(report.contains(part), "{part} in\n{report}");
        }
        let layers = text_of(&files, "lbl_analysis.md");
        assert!(layers.starts_with("# Layer analysis: `nf4` against `base` (from Q4_1 89 %, f32 11 %)\n"), "{layers}");
        let csv = text_of(&files, "report.csv");
        assert!(csv.contains("base,source_bytes,Q4_1,162080,bytes,36,"), "{csv}");
        assert!(csv.contains("nf4,source_bytes,F32,20032,bytes,11,"), "{csv}");
        let document: serde_json::Value = serde_json::from_str(text_of(&files, "report.json")).unwrap();
        assert_eq!(document["models"][0]["source_types"][0]["name"], "Q4_1");
        assert_eq!(document["models"][0]["scheme"], "f32 from Q4_1 89 %, f32 11 %");
        let mut damaged = base;
        std::sync::Arc::make_mut(&mut damaged).record.body["account"] = json!({"element_types": "Q4_1"});
        let error = rendered(&[ppl("ppl", &damaged, 9.0)], &[], &["md"]).unwrap_err().to_string();
        assert!(error.starts_with("read the record of base: field account.element_types"), "{error}");
    }

    #[test]
    fn no_input_at_all_is_a_report_that_says_so() {
        let files = rendered(&[], &["ppl".to_owned()], &["md", "csv", "json"]).unwrap();
        let report = text_of(&files, "report.md");
        assert!(report.contains("No model was measured. One input did not succeed"), "{report}");
        assert!(text_of(&files, "report.csv").starts_with("model,metric,label,value,unit,n,spread"));
    }

    #[test]
    fn a_record_without_its_fields_is_an_error_that_names_the_stage() {
        let broken = input("ppl-x", "ppl", json!({"results": [{"convention": "hf-strided"}]}), &[]);
        let error = rendered(&[broken], &[], &["md"]).unwrap_err().to_string();
        assert!(error.starts_with("read the record of ppl-x: field results[0].max_length: it is missing"), "{error}");
        let empty = input("diff-x", "diff", json!({"mode": "cumulative", "n_tokens": 1}), &[]);
        let error = rendered(&[empty], &[], &["md"]).unwrap_err().to_string();
        assert!(error.contains("diff-x: field only_in_reference: it is missing"), "{error}");
    }

    #[test]
    fn a_diverged_model_is_reported_beside_the_others() {
        let base = load("base");
        let row = |perplexity: f64, nll_mean: f64, stderr: Option<f64>| {
            let nll_interval = stderr.map(|stderr| interval(nll_mean, stderr));
            let perplexity_interval = nll_interval.as_ref().and_then(BlockInterval::exp);
            vec![PplResult { nll_mean, nll_interval, perplexity_interval, ..ppl_row(perplexity) }]
        };
        let mut inputs = Vec::new();
        for (name, results) in [
            ("good", row(9.06, 2.204, Some(0.01))),
            ("fair", row(11.0, 2.398, None)),
            ("lost", row(f64::INFINITY, 12_485.0, Some(2.5))),
            ("void", row(f64::NAN, f64::NAN, None)),
        ] {
            let model = quantize(name, &base, Some(("nf4", Some(64))), 6_200);
            inputs.push(decode(&format!("decode-{name}"), &model, 0.001, 1000));
            let body = serde_json::Value::Object(ppl_record(results).to_fields());
            inputs.push(input(&format!("ppl-{name}"), "ppl", body, &[("model", &model)]));
        }
        let files = rendered(&inputs, &[], &["md", "csv", "json"]).unwrap();
        let report = text_of(&files, "report.md");
        assert!(
            report.contains("| inf (n_scored = 9,612) |") && report.contains("| nan (n_scored = 9,612) |"),
            "{report}"
        );
        assert!(report.contains("| 12485.00 [12480.00, 12490.00] | inf |"), "{report}");
        assert!(report.contains("Left out, because their perplexity is not finite: `lost` and `void`."), "{report}");
        let csv = text_of(&files, "report.csv");
        assert!(csv.contains("lost,perplexity,hf-strided 512/256,inf,1,9612,inf,stderr,inf,inf,"), "{csv}");
        assert!(
            csv.contains("lost,nll_mean,hf-strided 512/256,12485,nats/token,9612,2.5,stderr,12480,12490,"),
            "{csv}"
        );
        assert!(csv.contains("void,perplexity,hf-strided 512/256,nan,1,9612,,,,,"), "{csv}");
        let json: serde_json::Value = serde_json::from_str(text_of(&files, "report.json")).unwrap();
        let value = |model: &str| {
            let of_model = json["measures"].as_array().into_iter().flatten();
            of_model
                .filter(|one| one["model"] == model && one["metric"] == "perplexity")
                .map(|one| one["value"].clone())
                .next()
        };
        assert_eq!((value("lost"), value("void")), (Some(json!("inf")), Some(json!("nan"))));
        let only_lost: Vec<_> = inputs.into_iter().filter(|input| input.address.ends_with("lost")).collect();
        assert!(rendered(&only_lost, &[], &["md", "csv"]).is_ok());
    }

    #[test]
    fn an_unknown_format_is_an_error_that_lists_the_known() {
        let error = rendered(&[], &[], &["pdf"]).unwrap_err().to_string();
        assert_eq!(error, "write format \"pdf\": labpipe knows md, csv, json");
    }
}
