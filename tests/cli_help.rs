//! What a user reads of the command line, as snapshots.
#![cfg(feature = "cpu")]

mod support;

use support::Lab;

#[test]
fn help_is_what_it_was() {
    let lab = Lab::new();
    for (name, args) in
        [("help", vec!["--help"]), ("run_help", vec!["run", "--help"]), ("rerun_help", vec!["rerun", "--help"])]
    {
        let (out, _) = lab.expect(0, &args);
        let lines: Vec<&str> = out.lines().map(str::trim_end).collect();
        insta::assert_snapshot!(name, lines.join("\n"));
    }
}

#[test]
fn errors_in_a_pipeline_are_shown_with_place_snippet_and_hint() {
    let lab = Lab::new();
    lab.write(
        "bad.yaml",
        "version: 1\nname: bad name\nvars: { model: models/stories260k }\nstages:\n  base: { kind: load, modell: \"${model}\" }\n  \
         nf4: { kind: quantise, model: base }\n  ppl: { kind: ppl, model: bas, text: \"${txt}\", stride: 9.5 }\n  \
         a: { kind: diff, reference: ppl, candidate: b }\n",
    );
    let (_, error) = lab.expect(2, &["validate", "bad.yaml"]);
    insta::assert_snapshot!("pipeline_errors", error);
}
