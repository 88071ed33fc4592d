//! Which path through a device is asked for.

/// Which path a model should take through a device, as `--execution` names it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ExecutionChoice {
    /// The fused path where it covers the model, else burn's.
    #[default]
    Auto,
    /// The definition in burn's tensor operations.
    Burn,
    /// The fused kernels; a model that they don't cover is refused.
    Fused,
}

impl ExecutionChoice {
    pub const ALL: [ExecutionChoice; 3] = [ExecutionChoice::Auto, ExecutionChoice::Burn, ExecutionChoice::Fused];

    /// Returns the name that people write.
    pub fn name(self) -> &'static str {
        match self {
            ExecutionChoice::Auto => "auto",
            ExecutionChoice::Burn => "burn",
            ExecutionChoice::Fused => "fused",
        }
    }
}

impl std::str::FromStr for ExecutionChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<ExecutionChoice, String> {
        let known = ExecutionChoice::ALL.into_iter().find(|choice| choice.name() == text);
        known.ok_or_else(|| format!("no execution is called {text:?}; there are auto, burn and fused"))
    }
}
