//! What a base model's `ppl` stage left for its candidates.

use super::passes::Pass;
use super::settings::parse_format;
use super::store;
use crate::artifact::{KeptLogProbs, PplRecord, TokenScores};
use crate::inference::{LogProbFormat, ModelInfo};
use crate::stage::{StageError, StageInput};
use crate::store::{LogProbReader, read_token_scores};

/// A base stage that a candidate may be held against.
pub struct Base<'a> {
    input: &'a StageInput,
    kept: Vec<KeptLogProbs>,
    vocab_size: usize,
}

/// What it holds of one pass.
pub struct BasePass {
    pub scores: TokenScores,
    pub reader: LogProbReader,
    /// `f16`, `top-64`.
    pub format: String,
}

impl<'a> Base<'a> {
    /// Checks that it kept log-probabilities, over the candidate's own tokens.
    ///
    /// # Errors
    /// `Input` with what to do about it.
    pub fn open(input: &'a StageInput, info: &ModelInfo, tokenizer_hash: &str) -> Result<Base<'a>, StageError> {
        let fail = |reason: String| Err(StageError::Input { address: input.address.clone(), reason });
        let record: PplRecord = input.body()?;
        let kept = record.log_probs.unwrap_or_default();
        if kept.is_empty() {
            return fail("it kept no log-probabilities; give it keep_log_probs: f16 (or f32, or top-k)".to_owned());
        }
        if record.results.iter().any(|row| row.tokenizer_hash != tokenizer_hash) {
            return fail("its model has another tokenizer, so that the two share no tokens".to_owned());
        }
        Ok(Base { input, kept, vocab_size: info.vocab_size })
    }

    /// Opens what it holds of a pass.
    ///
    /// # Errors
    /// `Input` where it scored other tokens.
    pub fn pass(&self, pass: &Pass) -> Result<BasePass, StageError> {
        let fail = |reason: String| StageError::Input { address: self.input.address.clone(), reason };
        let name = pass.cut.name();
        let file = format!("log_probs-{name}.parquet");
        let kept = self.kept.iter().find(|kept| kept.file == file);
        let kept = kept.ok_or_else(|| fail(format!("it kept no log-probabilities of the windows {name}")))?;
        let format: LogProbFormat = parse_format(&kept.format)
            .ok_or_else(|| fail(format!("it kept log-probabilities as {:?}, which is not known", kept.format)))?;
        let scores = read_token_scores(&self.input.dir.join(format!("tokens-{name}.parquet"))).map_err(store)?;
        let targets = pass
            .windows
            .iter()
            .flat_map(|window| pass.tokens[window.begin + window.first_target..window.end].iter().copied());
        if !targets.eq(scores.token_id.iter().copied()) {
            return Err(fail("it scored other tokens; run it again with --force if the text changed".to_owned()));
        }
        let reader = LogProbReader::open(&self.input.dir.join(file), format, self.vocab_size).map_err(store)?;
        Ok(BasePass { scores, reader, format: kept.format.clone() })
    }
}
