//! The matrix: which cells there are, what stands once for all of them, and what is wrong with one.

use labpipe::pipeline::{self, ParseOptions, Pipeline, github_matrix};
use labpipe::stages;

const PIPELINE: &str = r#"
version: 1
name: sweep
vars: { path: "models/${size}" }
matrix:
  size: [small, large]
  config: [experiments/nf4.yaml, experiments/int8.yaml]
  exclude: [{ size: large, config: experiments/int8.yaml }]
  include: [{ size: huge, config: experiments/int4.yaml }]
stages:
  base:   { kind: load, model: "${path}" }
  quant:  { kind: quantize, model: base, config: "${config}" }
  ppl:    { kind: ppl, model: quant, text: t.txt }
  other:  { kind: load, model: models/one }
  report: { kind: report, inputs: [ppl, other] }
"#;

fn parse(text: &str, options: &ParseOptions) -> Result<Pipeline, String> {
    pipeline::parse(text, "test.yaml", &stages::catalogue(), options).map_err(|error| error.render())
}

fn addresses(pipeline: &Pipeline, name: &str) -> Vec<String> {
    pipeline.stages.iter().filter(|stage| stage.name == name).map(|stage| stage.address.clone()).collect()
}

fn narrow(variable: &str, values: &[&str]) -> ParseOptions {
    let values = values.iter().map(|value| (*value).to_owned()).collect();
    ParseOptions { matrix: vec![(variable.to_owned(), values)], ..ParseOptions::default() }
}

#[test]
fn cells_are_the_product_without_what_is_excluded_and_with_what_is_included() {
    let pipeline = parse(PIPELINE, &ParseOptions::default()).expect("a pipeline");
    let cells: Vec<String> = pipeline.cells.iter().map(|cell| cell.label()).collect();
    assert_eq!(
        cells,
        ["size=small,config=nf4", "size=small,config=int8", "size=large,config=nf4", "size=huge,config=int4"]
    );
    // A stage stands once for each combination of what it depends on, its inputs and variables of variables included.
    assert_eq!(addresses(&pipeline, "base"), ["base[size=small]", "base[size=large]", "base[size=huge]"]);
    assert_eq!(addresses(&pipeline, "quant").len(), 4);
    assert_eq!(addresses(&pipeline, "other"), ["other"]);
    assert_eq!(addresses(&pipeline, "report"), ["report"]);
    let of = |address: &str| pipeline.stages.iter().find(|stage| stage.address == address).expect("the stage");
    assert_eq!(of("quant[size=huge,config=int4]").inputs["model"], ["base[size=huge]"]);
    assert_eq!(of("base[size=huge]").params["model"], "models/huge");
    assert_eq!(of("report").inputs["inputs"].len(), 5);
}

#[test]
fn narrowing_keeps_cells_by_short_name_or_by_value() {
    for value in ["int8", "experiments/int8.yaml"] {
        let pipeline = parse(PIPELINE, &narrow("config", &[value])).expect("a pipeline");
        assert_eq!(addresses(&pipeline, "ppl"), ["ppl[size=small,config=int8]"]);
    }
    let pipeline = parse(PIPELINE, &narrow("size", &["small", "huge"])).expect("a pipeline");
    assert_eq!(pipeline.cells.len(), 3);
    let set = ParseOptions { set: vec![("size".to_owned(), "tiny".to_owned())], ..ParseOptions::default() };
    let pipeline = parse(PIPELINE, &set).expect("a pipeline");
    assert_eq!(addresses(&pipeline, "base"), ["base[size=tiny]"]);
}

#[test]
fn each_cell_of_the_github_matrix_narrows_a_run_to_itself() {
    let pipeline = parse(PIPELINE, &ParseOptions::default()).expect("a pipeline");
    let matrix = github_matrix(&pipeline);
    let entries = matrix["include"].as_array().expect("cells");
    assert_eq!(entries.len(), 4);
    for entry in entries {
        let words: Vec<&str> = entry["narrow"].as_str().expect("options").split(' ').collect();
        let pairs = words.chunks(2).map(|pair| {
            assert_eq!(pair[0], "--matrix");
            let (name, value) = pair[1].split_once('=').expect("name=value");
            (name.to_owned(), vec![value.to_owned()])
        });
        let options = ParseOptions { matrix: pairs.collect(), ..ParseOptions::default() };
        let cells = parse(PIPELINE, &options).expect("a pipeline").cells;
        assert_eq!(
            cells.iter().map(|cell| cell.label()).collect::<Vec<_>>(),
            [entry["label"].as_str().expect("a label")]
        );
    }
}

#[test]
fn mistakes_in_a_matrix_are_named() {
    for (from, to, expected) in [
        ("[small, large]", "[]", "the list is empty"),
        ("[small, large]", "small", "expected a list of values"),
        ("[small, large]", "[small, [large]]", "expected scalars"),
        ("exclude: [{ size:", "exclude: [{ sise:", "did you mean \"size\"?"),
        ("include: [{ size: huge,", "include: [{", "a cell needs every variable"),
        ("[small, large]", "[a/x.yaml, a/x.yaml2, b/x.yaml]", ""),
        ("\"${path}\"", "\"${paht}\"", "did you mean \"path\"?"),
    ] {
        assert!(PIPELINE.contains(from), "{from}");
        let result = parse(&PIPELINE.replace(from, to), &ParseOptions::default());
        match result {
            Ok(pipeline) if expected.is_empty() => {
                // Values whose short names collide keep their long ones.
                let bases = addresses(&pipeline, "base");
                assert!(bases.contains(&"base[size=a-x.yaml]".to_owned()), "{bases:?}");
            }
            Ok(_) => panic!("{to} was taken"),
            Err(error) => assert!(!expected.is_empty() && error.contains(expected), "{to}:\n{error}"),
        }
    }
    let error = parse(PIPELINE, &narrow("config", &["int9"])).expect_err("an error");
    assert!(error.contains("no cell has that value") && error.contains("did you mean"), "{error}");
    let many: Vec<String> = (0..70).map(|i| i.to_string()).collect();
    let many = many.join(", ");
    let giant = format!(
        "version: 1\nname: x\nmatrix: {{ a: [{many}], b: [{many}] }}\nstages: {{ s: {{ kind: load, model: \"${{a}}${{b}}\" }} }}\n"
    );
    assert!(parse(&giant, &ParseOptions::default()).expect_err("an error").contains("4900 cells"));
}
