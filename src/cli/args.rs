//! Arguments.

use crate::inference::ExecutionChoice;
use crate::units::parse_size;
use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  labpipe run pipelines/sensitivity.yaml
  labpipe run pipelines/benchmark.yaml --set model=/models/Llama-3.2-3B-Instruct
  labpipe rerun --from diff
  labpipe show diff --json

Exit codes: 0 ok; 2 usage or pipeline error, before any stage starts; 3 a stage failed;
4 device missing or out of memory; 5 a check or comparison failed; 6 the output could not be
written (a full disk; a reader that closes its pipe is no error); 1 a bug in labpipe; 130 stopped
by Ctrl-C.";

/// Runs declarative experiment pipelines on quantized language models.
#[derive(Debug, Parser)]
#[command(name = "labpipe", version, about, after_help = EXAMPLES, max_term_width = 110)]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Where things are and how they are shown.
#[derive(Debug, Clone, ClapArgs)]
pub struct Global {
    /// Where relative paths in pipeline files start
    #[arg(long, global = true, value_name = "DIR", default_value = ".", help_heading = "Folders")]
    pub root: PathBuf,
    /// Where artifacts are kept
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "cache",
        env = "LABPIPE_CACHE",
        help_heading = "Folders"
    )]
    pub cache: PathBuf,
    /// Where runs leave records and reports
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "results",
        env = "LABPIPE_RESULTS",
        help_heading = "Folders"
    )]
    pub results: PathBuf,
    /// How progress is shown: bars on a terminal and plain lines elsewhere, plain lines, or JSON lines
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value = "auto", help_heading = "Output")]
    pub log_format: LogFormat,
    /// Tell more
    #[arg(short, long, global = true, help_heading = "Output")]
    pub verbose: bool,
    /// Tell warnings only
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Output")]
    pub quiet: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Auto,
    Plain,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline; what is in the cache is not computed again
    Run(RunArgs),
    /// Run one stage of the latest run and all after it, the rest from the cache
    Rerun(RerunArgs),
    /// Show what would run, and why; run nothing
    Plan(PlanArgs),
    /// Show a stage's record of the latest run
    Show(ShowArgs),
    /// Show two runs' numbers side by side: what differs, and whether by more than noise
    Compare(CompareArgs),
    /// Print the graph of stages
    Graph(GraphArgs),
    /// Check a pipeline file and the files it names
    Validate(PipelineArgs),
    /// List the cells of a pipeline's matrix
    Matrix(MatrixArgs),
    /// List the kinds of stage with every parameter
    Stages {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON Schema of pipeline files
    Schema,
    /// Look after the cache
    Cache {
        #[command(subcommand)]
        action: CacheAction,
    },
    /// Tell what this machine has and what of labpipe works on it
    Doctor {
        /// Run small models of every family and scheme on the device and compare their numbers with the CPU's
        #[arg(long)]
        self_test: bool,
        /// The device that is tested: auto, cpu, cuda, cuda:N or wgpu
        #[arg(long, value_name = "DEVICE", default_value = "auto", requires = "self_test")]
        device: String,
    },
    /// Run stages that another labpipe sends on stdin
    #[command(hide = true)]
    Worker {
        #[arg(long)]
        device: String,
        #[arg(long)]
        accept_disturbed: bool,
        /// In bytes
        #[arg(long)]
        memory_limit: Option<u64>,
        #[arg(long)]
        execution: ExecutionChoice,
        /// What the parent knows of the processors
        #[arg(long)]
        processor_speeds: Option<String>,
    },
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
}

/// A pipeline file and what the command line changes in it.
#[derive(Debug, Clone, ClapArgs)]
pub struct PipelineArgs {
    /// The pipeline file
    pub file: PathBuf,
    /// Set a variable (repeatable). Text takes the value as given; a number, true or false, a [list] or a {mapping} is parsed
    /// where one is wanted
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
    /// Keep only these values of a matrix variable (repeatable), as labpipe matrix names them or as the file writes them
    #[arg(long, value_name = "NAME=A,B", value_parser = pair)]
    pub matrix: Vec<(String, String)>,
    /// auto, cpu, cuda, cuda:N or wgpu, over what the file says
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// How models run, over what the file says: auto (the fastest way that computes the model), burn (burn's operations alone) or
    /// fused (a GPU's fused kernels; a model that they don't compute is refused)
    #[arg(long, value_name = "PATH")]
    pub execution: Option<ExecutionChoice>,
}

/// How much memory models may take.
#[derive(Debug, Clone, Copy, ClapArgs)]
pub struct MemoryArgs {
    /// Most memory that a model and all it needs may take, as 7.5GiB, over what the file says: device memory on a GPU, the worker
    /// process's on a CPU. A stage that would take more is refused before anything runs
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory_limit: Option<u64>,
}

/// Which stages, and how.
#[derive(Debug, Clone, ClapArgs)]
pub struct SelectArgs {
    /// Only this stage, its inputs from the cache (repeatable)
    #[arg(long, value_name = "STAGE", conflicts_with = "until")]
    pub only: Vec<String>,
    /// This stage and all it needs (repeatable)
    #[arg(long, value_name = "STAGE")]
    pub until: Vec<String>,
    /// Run though cached
    #[arg(long)]
    pub force: bool,
    /// Repeat measurements, all or one stage's
    #[arg(long, value_name = "STAGE", num_args = 0..=1, default_missing_value = "", require_equals = true)]
    pub remeasure: Vec<String>,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct RunArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub select: SelectArgs,
    /// Stages that may run at once; a stage that measures has its device alone
    #[arg(long, value_name = "N", default_value = "2", value_parser = jobs)]
    pub jobs: usize,
    /// Keep measurements that something else disturbed, without a second attempt and without a warning; records say so all the
    /// same. For machines that are always shared
    #[arg(long)]
    pub accept_disturbed: bool,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct RerunArgs {
    /// The first stage to run again; all after it follow (repeatable)
    #[arg(long, value_name = "STAGE", required = true)]
    pub from: Vec<String>,
    /// Compute what the cache lacks of the stages before it
    #[arg(long)]
    pub rebuild_upstream: bool,
    /// Repeat a run other than the latest
    #[arg(long, value_name = "RUN_ID")]
    pub run: Option<String>,
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Stages that may run at once
    #[arg(long, value_name = "N", default_value = "2", value_parser = jobs)]
    pub jobs: usize,
    /// Keep measurements that something else disturbed, without a second attempt and without a warning; records say so all the
    /// same. For machines that are always shared
    #[arg(long)]
    pub accept_disturbed: bool,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct PlanArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    #[command(flatten)]
    pub memory: MemoryArgs,
    #[command(flatten)]
    pub select: SelectArgs,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct GraphArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// dot (Graphviz) or mermaid
    #[arg(long, value_enum, default_value = "dot")]
    pub format: GraphFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum GraphFormat {
    Dot,
    Mermaid,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct MatrixArgs {
    #[command(flatten)]
    pub pipeline: PipelineArgs,
    /// text, json, or github: what strategy.matrix of a GitHub Actions job takes
    #[arg(long, value_enum, default_value = "text")]
    pub format: MatrixFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum MatrixFormat {
    Text,
    Json,
    Github,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct ShowArgs {
    /// A stage's name, or its address nf4[config=int8]
    pub stage: String,
    /// The whole record as JSON
    #[arg(long)]
    pub json: bool,
    /// A run other than the latest
    #[arg(long, value_name = "RUN_ID")]
    pub run: Option<String>,
}

#[derive(Debug, Clone, ClapArgs)]
pub struct CompareArgs {
    /// The first run: its id, its folder, or latest
    #[arg(value_name = "RUN_A")]
    pub a: String,
    /// The second run
    #[arg(value_name = "RUN_B")]
    pub b: String,
    /// List equal numbers and every module's too
    #[arg(long)]
    pub all: bool,
    /// As JSON
    #[arg(long, conflicts_with = "all")]
    pub json: bool,
    /// Exit with code 5 if anything lies outside the noise or can't be compared
    #[arg(long)]
    pub fail_on_difference: bool,
}

#[derive(Debug, Clone, Subcommand)]
pub enum CacheAction {
    /// List artifacts: stage, kind, size, when
    Ls,
    /// Hash every file again; exit code 5 if one is damaged
    Verify,
    /// Remove artifacts that no run in the results refers to, and what killed runs left; exit code 5 if the results can't be read
    Gc {
        /// Tell what would be removed, remove nothing
        #[arg(long)]
        dry_run: bool,
        /// Keep what is younger
        #[arg(long, value_name = "DAYS", default_value = "0")]
        older_than: u64,
        /// Remove what was not used for longest, referred to or not, until the rest fits; measurements last, as repeating one
        /// gives other numbers
        #[arg(long, value_name = "SIZE", value_parser = size)]
        max_size: Option<u64>,
        /// Go on where results that refer to artifacts can't be read, as if they referred to none
        #[arg(long)]
        force: bool,
    },
}

/// More stages at once than this are taken for a mistake.
const MAX_JOBS: usize = 1024;

fn jobs(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=MAX_JOBS).contains(&n) => Ok(n),
        _ => Err(format!("expected a whole number from 1 to {MAX_JOBS}, found {text:?}")),
    }
}

/// What sizes look like.
const SIZES: &str = "a size such as 20GiB, 500MB or a number of bytes";

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| format!("expected {SIZES}, found {text:?}"))
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), value.to_owned())),
        _ => Err(format!("expected NAME=VALUE, found {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_bounded() {
        assert!(jobs("1") == Ok(1) && jobs("1024") == Ok(1024));
        for text in ["0", "1025", "-1", "two", "99999999999999999999"] {
            assert!(jobs(text).is_err(), "{text}");
        }
    }
}
