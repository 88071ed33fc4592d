//! `report`: turns records into pages, tables and plots that a person reads.

use crate::artifact::{RecordBody, ReportRecord, ReportedFile, TokenScores};
use crate::report::{ReportRequest, ScatterSource, TokenSource, render};
use crate::stage::{
    ParamDefault, ParamDesc, ParamType, Stage, StageContext, StageDescription, StageError, StageInput, StageOutput,
};
use crate::store::{read_scatter, read_token_scores};
use crate::units::format_bytes;
use serde_json::Value;

/// The kind.
pub struct Report;

static DESCRIPTION: StageDescription = StageDescription {
    kind: "report",
    summary: "Writes a comparison of models and a layer-by-layer analysis: Markdown, CSV, JSON and plots.",
    version: 7,
    measures: false,
    computes: false,
    params: &[
        ParamDesc {
            name: "inputs",
            ty: ParamType::StageRefs(&["load", "quantize", "prefill-bench", "decode-bench", "ppl", "diff"]),
            unit: None,
            default: ParamDefault::Required,
            help: "stages to report on; over a matrix, every cell's",
        },
        ParamDesc {
            name: "formats",
            ty: ParamType::SomeOf(&["md", "csv", "json"]),
            unit: None,
            default: ParamDefault::Json("[\"md\", \"csv\", \"json\"]"),
            help: "what to write; plots come with md",
        },
        ParamDesc {
            name: "title",
            ty: ParamType::Word,
            unit: None,
            default: ParamDefault::Absent,
            help: "the page's title; the stage's address unless given",
        },
    ],
};

/// Reads the points that a `diff` stage kept beside its record.
struct ScatterFiles;

impl ScatterSource for ScatterFiles {
    fn read(
        &self,
        diff: &StageInput,
        take: &mut dyn FnMut(&str, Vec<(f32, f32)>),
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        for (module, pairs) in read_scatter(&diff.dir.join("scatter.parquet"))? {
            take(&module, pairs);
        }
        Ok(())
    }
}

/// Reads the scores that a `ppl` stage kept beside its record.
struct TokenFiles;

impl TokenSource for TokenFiles {
    fn read(&self, ppl: &StageInput, windows: &str) -> Option<TokenScores> {
        read_token_scores(&ppl.dir.join(format!("tokens-{windows}.parquet"))).ok()
    }
}

impl Stage for Report {
    fn description(&self) -> &'static StageDescription {
        &DESCRIPTION
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let inputs = context.inputs.get("inputs").map(Vec::as_slice).unwrap_or_default();
        let named = context.params["formats"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let named: Vec<String> = named.map(str::to_owned).collect();
        let request = ReportRequest {
            title: context.params.get("title").and_then(Value::as_str).unwrap_or(context.address),
            pipeline: inputs.first().map_or("", |input| input.record.head.pipeline.as_str()),
            inputs,
            missing: context.missing_inputs,
            formats: &named,
            scatter: &ScatterFiles,
            tokens: &TokenFiles,
        };
        let files = render(&request).map_err(|error| StageError::Other(error.to_string()))?;
        let mut listed: Vec<ReportedFile> = Vec::new();
        for file in &files {
            let path = context.out_dir.join(&file.path);
            let write = || {
                std::fs::create_dir_all(path.parent().unwrap_or(context.out_dir))?;
                std::fs::write(&path, &file.bytes)
            };
            write().map_err(|source| StageError::Write { path: path.clone(), source })?;
            let path = file.path.to_string_lossy().into_owned();
            listed.push(ReportedFile { path, bytes: file.bytes.len() as u64 });
        }
        let bytes: u64 = files.iter().map(|file| file.bytes.len() as u64).sum();
        let record = ReportRecord { files: listed, missing_inputs: context.missing_inputs.to_vec() };
        Ok(StageOutput::new(record.to_fields(), format!("{} files, {}", files.len(), format_bytes(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::formats;

    #[test]
    fn the_parameter_offers_every_format_that_has_an_exporter() {
        let ParamType::SomeOf(offered) = &DESCRIPTION.param("formats").expect("the parameter").ty else {
            panic!("formats is a list of words");
        };
        assert_eq!(offered.to_vec(), formats());
    }
}
