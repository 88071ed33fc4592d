//! The Stage trait, descriptions of parameters, and the catalogue that the other rooms read stages from.

use crate::artifact::{Execution, Record, RecordBody};
use crate::event::Progress;
use crate::inference::{Engine, InferenceError, MemoryNeed, Model, ModelRecipe};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::DerefMut;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a parameter may hold. Drives reading, `labpipe stages`, the JSON Schema and the key.
#[derive(Debug, Clone, PartialEq)]
pub enum ParamType {
    Bool,
    /// A whole number within the range, ends included.
    Integer {
        min: i64,
        max: i64,
    },
    /// A list of whole numbers; a single one is a list of one.
    Integers {
        min: i64,
        max: i64,
    },
    Float {
        min: f64,
        max: f64,
    },
    /// Any text.
    Word,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A list of these words; a single one is a list of one.
    SomeOf(&'static [&'static str]),
    /// A list of globs over module names; a single one is a list of one.
    Globs,
    /// The name of a stage of one of these kinds: an edge.
    StageRef(&'static [&'static str]),
    /// Names of stages of any of these kinds. It gathers over a matrix: the consumer runs once, for all cells.
    StageRefs(&'static [&'static str]),
    /// A model folder, a GGUF file or a hub id; its files' content is in the key.
    Model,
    /// `{config: FILE, seed: N}`; the file's content is in the key.
    RandomModel,
    /// A path or `hf://datasets/…`, a list of them, or `{source, n_chars | n_tokens: N, separator, column, join}`; the
    /// files' content is in the key. Canonical form: that mapping with every key, null where absent; `source` is a list
    /// only where there are several.
    TextSource,
    /// A path to a quantization config, or the config itself as a mapping; what it means is in the key.
    QuantizationConfig,
}

/// What a parameter is where the file does not name it.
#[derive(Debug, Clone, PartialEq)]
pub enum ParamDefault {
    Required,
    /// Absent: null in the canonical parameters.
    Absent,
    /// This JSON text.
    Json(&'static str),
}

/// One parameter of a stage.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamDesc {
    pub name: &'static str,
    pub ty: ParamType,
    /// `tokens`, `passes`, `characters`; null where it counts nothing.
    pub unit: Option<&'static str>,
    pub default: ParamDefault,
    pub help: &'static str,
}

/// What a kind of stage is.
#[derive(Debug, Clone, PartialEq)]
pub struct StageDescription {
    pub kind: &'static str,
    /// One sentence, third person.
    pub summary: &'static str,
    /// Grows when the stage's output changes for the same input.
    pub version: u32,
    /// It times or weighs something: it holds its device alone and the device's identity is in its key.
    pub measures: bool,
    /// It computes with a model: the engine's numerics version is in its key.
    pub computes: bool,
    pub params: &'static [ParamDesc],
}

impl StageDescription {
    /// Returns the parameter of that name.
    pub fn param(&self, name: &str) -> Option<&'static ParamDesc> {
        self.params.iter().find(|param| param.name == name)
    }
}

/// Canonical parameters: every parameter of the description is there, defaults filled in, null where absent.
pub type Params = Map<String, Value>;

/// A committed artifact that a stage reads.
#[derive(Debug, Clone)]
pub struct StageInput {
    /// `nf4[config=int8]`.
    pub address: String,
    pub kind: String,
    pub key: String,
    pub record: Record,
    /// Folder in the cache that holds its files.
    pub dir: PathBuf,
    /// Its own inputs, by parameter name: lineage as far up as it goes.
    pub inputs: BTreeMap<String, Vec<Arc<StageInput>>>,
}

impl StageInput {
    /// Returns the model recipe that a `load` or `quantize` stage committed.
    ///
    /// # Errors
    /// Where the record holds none or one that can't be read.
    pub fn recipe(&self) -> Result<ModelRecipe, StageError> {
        let value = self.record.body.get("recipe").cloned().unwrap_or(Value::Null);
        serde_json::from_value(value).map_err(|error| StageError::Input {
            address: self.address.clone(),
            reason: format!("its record holds no readable model recipe ({error})"),
        })
    }

    /// Reads its record's body.
    ///
    /// # Errors
    /// Where a field is missing or has another type; it is named.
    pub fn body<T: RecordBody>(&self) -> Result<T, StageError> {
        self.record.read().map_err(|error| StageError::Other(error.to_string()))
    }

    /// Returns the first input under that parameter.
    pub fn input(&self, param: &str) -> Option<&Arc<StageInput>> {
        self.inputs.get(param).and_then(|inputs| inputs.first())
    }
}

/// A model lent to one stage; it goes back when dropped.
pub type ModelLease<'a> = Box<dyn DerefMut<Target = dyn Model + 'static> + 'a>;

/// Lends models and decides which stay loaded.
pub trait ModelPool: Sync {
    /// Returns the model, loading it if it isn't there.
    ///
    /// # Errors
    /// Whatever kept the engine from opening it.
    fn acquire(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<ModelLease<'_>, InferenceError>;
}

/// Which of a stage's starts runs. A stage that measures runs several times, each in a fresh process that loads the model anew
/// ([`Stage::n_starts`]); any other stage runs in its first and only one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// From 0.
    pub idx: usize,
    /// How many there are.
    pub n: usize,
}

impl Start {
    pub const ONLY: Start = Start { idx: 0, n: 1 };

    /// Returns how many of `total` fall to this start; what cannot be divided evenly goes to the first ones.
    pub fn share(self, total: usize) -> usize {
        total / self.n.max(1) + usize::from(self.idx < total % self.n.max(1))
    }
}

/// What a stage may use while it runs.
pub struct StageContext<'a> {
    pub address: &'a str,
    pub params: &'a Params,
    /// Relative paths in parameters start here.
    pub root: &'a Path,
    /// By parameter name, in the order in which the file names them.
    pub inputs: &'a BTreeMap<String, Vec<Arc<StageInput>>>,
    /// Inputs of a gathering parameter that failed and are therefore missing, by address.
    pub missing_inputs: &'a [String],
    /// Staging folder: what is written here is committed with the record if the stage succeeds.
    pub out_dir: &'a Path,
    pub start: Start,
    pub engine: &'a dyn Engine,
    pub models: &'a dyn ModelPool,
    pub progress: &'a dyn Progress,
    /// `--accept-disturbed`: a disturbed measurement is kept without a second attempt and without a warning.
    pub accept_disturbed: bool,
    /// A disturbed measurement may be made again as a whole: false once that was in vain.
    pub may_repeat: bool,
}

impl StageContext<'_> {
    /// Returns the recipe of the model under that parameter, its paths starting at the root.
    ///
    /// # Errors
    /// Where there is no such input or its record holds no recipe.
    pub fn recipe(&self, param: &str) -> Result<ModelRecipe, StageError> {
        Ok(self.input(param)?.recipe()?.rooted(self.root))
    }

    /// Returns the first input under that parameter.
    ///
    /// # Errors
    /// Where there is none: the plan left an edge out, or the stage names a parameter that is no edge.
    pub fn input(&self, param: &str) -> Result<&Arc<StageInput>, StageError> {
        self.inputs.get(param).and_then(|inputs| inputs.first()).ok_or_else(|| StageError::Input {
            address: param.to_owned(),
            reason: "it is not among this stage's inputs".to_owned(),
        })
    }
}

/// What a stage leaves.
#[derive(Debug, Clone, Default)]
pub struct StageOutput {
    /// The kind's own fields of the record.
    pub body: Map<String, Value>,
    /// One line for the summary table, units included: `ppl 9.061 ± 0.21 (hf-strided, n = 9,612)`.
    pub summary: String,
    /// How its model was run: filled in by who runs it.
    pub execution: Option<Execution>,
}

impl StageOutput {
    /// Takes a record's own fields and the line that sums them up.
    pub fn new(body: Map<String, Value>, summary: impl Into<String>) -> StageOutput {
        StageOutput { body, summary: summary.into(), execution: None }
    }
}

/// One kind of stage.
pub trait Stage: Send + Sync {
    fn description(&self) -> &'static StageDescription;

    /// Returns what is wrong with parameters that are right one by one: (parameter, problem, hint).
    fn check(&self, _params: &Params) -> Vec<(&'static str, String, Option<String>)> {
        Vec::new()
    }

    /// Fills in parameters whose default depends on others, so that spelling a default out changes no key.
    fn complete(&self, _params: &mut Params) {}

    /// Returns what the stage asks of its model's memory; `base` are the parameters of the stage under `base`, where there is one.
    fn memory_need(&self, _params: &Params, _base: Option<&Params>) -> MemoryNeed {
        MemoryNeed::Nothing
    }

    /// Returns the recipe that the stage makes, from that of its model where it has one, as its record will hold it; `None` for kinds
    /// that make no model.
    ///
    /// # Errors
    /// Where what parameters name can't be read.
    fn recipe(
        &self,
        _params: &Params,
        _root: &Path,
        _model: Option<ModelRecipe>,
    ) -> Result<Option<ModelRecipe>, StageError> {
        Ok(None)
    }

    /// Returns in how many starts the work is done; `is_host` where the device is the host's processor. Stages that don't measure have
    /// one.
    fn n_starts(&self, _params: &Params, _is_host: bool) -> usize {
        1
    }

    /// Does the work of one start, writing files into `context.out_dir`.
    ///
    /// # Errors
    /// Whatever stopped it; nothing is committed then.
    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError>;

    /// Makes one output of those of all starts, in their order. It is called only where there were several.
    ///
    /// # Errors
    /// Where they do not belong together.
    fn combine(&self, outputs: Vec<StageOutput>) -> Result<StageOutput, StageError> {
        let n_outputs = outputs.len();
        outputs.into_iter().next_back().filter(|_| n_outputs == 1).ok_or_else(|| {
            StageError::Other(format!("combine {n_outputs} starts: {} runs in one", self.description().kind))
        })
    }
}

/// The kinds of stage there are, by kind.
#[derive(Clone, Default)]
pub struct Catalogue {
    stages: BTreeMap<&'static str, Arc<dyn Stage>>,
}

impl Catalogue {
    /// Builds a catalogue; of two stages of one kind the later stays.
    pub fn new(stages: impl IntoIterator<Item = Arc<dyn Stage>>) -> Catalogue {
        Catalogue { stages: stages.into_iter().map(|stage| (stage.description().kind, stage)).collect() }
    }

    pub fn get(&self, kind: &str) -> Option<&Arc<dyn Stage>> {
        self.stages.get(kind)
    }

    /// Returns the kinds in alphabetical order.
    pub fn kinds(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.stages.keys().copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Stage>> + '_ {
        self.stages.values()
    }
}

/// Why a stage stopped. The text fits "stage X failed to {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageError {
    #[error(transparent)]
    Inference(#[from] InferenceError),
    #[error("use input {address}: {reason}")]
    Input { address: String, reason: String },
    #[error("use parameter {param}: {reason}")]
    Param { param: String, reason: String },
    #[error("read {path}: {reason}")]
    Read { path: PathBuf, reason: String },
    #[error("write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("tokenize {path}: {reason}")]
    Tokenize { path: PathBuf, reason: String },
    #[error("{0}")]
    Other(String),
    /// The device is missing, lost or out of memory; told by a worker.
    #[error("{0}")]
    Device(String),
    /// Work that was given up and can't be stopped: it goes on until its process ends.
    #[error("{0}")]
    Unstoppable(String),
    #[error("cancelled")]
    Cancelled,
}

impl StageError {
    /// Returns true if the device is missing, lost or out of memory.
    pub fn is_device(&self) -> bool {
        match self {
            StageError::Device(_) => true,
            StageError::Inference(error) => error.is_device(),
            _ => false,
        }
    }

    /// Returns true where the user stopped it.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, StageError::Cancelled | StageError::Inference(InferenceError::Cancelled))
    }
}
