//! What the tests that start labpipe share: a folder to work in, and the program in it.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// A folder with the repository's models, texts and configs beside its own cache and results.
pub struct Lab {
    dir: TempDir,
}

impl Lab {
    pub fn new() -> Lab {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for name in ["models", "experiments", "pipelines"] {
            let target = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
            std::os::unix::fs::symlink(target, dir.path().join(name)).expect("a link");
        }
        Lab { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a file");
    }

    /// Returns labpipe, ready to be started in the folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_labpipe"));
        command.current_dir(self.dir.path()).args(args).env_remove("SAVE_EVAL_RESULTS");
        command.env_remove("LABPIPE_CACHE").env_remove("LABPIPE_RESULTS");
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("labpipe starts")
    }

    /// Runs labpipe and expects an exit code.
    #[track_caller]
    pub fn expect(&self, code: i32, args: &[&str]) -> (String, String) {
        let output = self.run(args);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "labpipe {args:?}\n{out}\n{err}");
        (out, err)
    }

    /// Returns a stage's record of the latest run.
    #[track_caller]
    pub fn record(&self, stage: &str) -> Value {
        let (out, _) = self.expect(0, &["show", stage, "--json"]);
        serde_json::from_str(&out).expect("JSON")
    }

    /// Returns the latest run's `run.json`.
    pub fn run_json(&self) -> Value {
        let bytes = std::fs::read(self.path("results/latest/run.json")).expect("run.json");
        serde_json::from_slice(&bytes).expect("JSON")
    }

    /// Returns how each stage of the latest run ended.
    pub fn outcomes(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let stages = self.run_json()["stages"].as_array().cloned().unwrap_or_default();
        stages.iter().map(|stage| (text(&stage["stage"]), text(&stage["outcome"]))).collect()
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
