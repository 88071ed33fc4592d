//! The passes over a text that its conventions need: what is run, window by window, and what of it is scored.

use super::settings::Settings;
use crate::metrics::{Convention, Cut, MetricsError, TextUnits, Window, half_windows, rolling_windows, windows};
use crate::stage::StageError;
use crate::stages::text::{TextForModel, TokenizedText};

/// All windows of one cut, for every convention that cuts so.
pub struct Pass {
    pub cut: Cut,
    pub conventions: Vec<Convention>,
    /// Windows are slices of these.
    pub tokens: Vec<u32>,
    /// Index of the first token of each document.
    pub document_starts: Vec<usize>,
    pub windows: Vec<Window>,
    pub max_length: usize,
    pub stride: usize,
    /// Tokens in the text.
    pub n_tokens: usize,
    pub bos: String,
    pub text_hash: String,
    pub tokenizer_hash: String,
    /// For lm-eval.
    pub n_documents: Option<usize>,
    pub units: Option<TextUnits>,
}

impl Pass {
    /// Returns the indices of the documents that the scored tokens of a window belong to.
    pub fn document_idx(&self, window: &Window) -> impl Iterator<Item = u32> {
        (window.begin + window.first_target..window.end).map(|token_idx| {
            let n_begun = self.document_starts.partition_point(|start| *start <= token_idx);
            u32::try_from(n_begun.saturating_sub(1)).unwrap_or(u32::MAX)
        })
    }

    pub fn n_scored(&self) -> usize {
        self.windows.iter().map(|window| window.end - window.begin - window.first_target).sum()
    }
}

/// Returns the passes, one a cut, in the order in which conventions first ask for them; at least one.
///
/// # Errors
/// `Param` where the text is too short, and what tokenizing gives.
pub fn passes(settings: &Settings<'_>, text: &TextForModel<'_>) -> Result<Vec<Pass>, StageError> {
    let mut cuts: Vec<(Cut, Vec<Convention>)> = Vec::new();
    for convention in &settings.conventions {
        let cut = convention.cut(settings.max_length, settings.stride);
        match cuts.iter_mut().find(|(known, _)| *known == cut) {
            Some((_, conventions)) => conventions.push(*convention),
            None => cuts.push((cut, vec![*convention])),
        }
    }
    let whole = text.whole()?;
    let passes = cuts.into_iter().map(|(cut, conventions)| match cut {
        Cut::Strided { max_length, stride } => {
            strided(settings, &whole, max_length, stride).map(|pass| Pass { conventions, ..pass })
        }
        Cut::Halves { n_ctx } => halves(&whole, n_ctx).map(|pass| Pass { conventions, ..pass }),
        Cut::Rolling { max_length } => {
            rolling(settings, &whole, text, max_length).map(|pass| Pass { conventions, ..pass })
        }
    });
    passes.collect()
}

fn text_error(error: &MetricsError) -> StageError {
    StageError::Param { param: "text".to_owned(), reason: error.to_string() }
}

fn pass(cut: Cut, text: &TokenizedText, windows: Vec<Window>, max_length: usize, stride: usize) -> Pass {
    Pass {
        cut,
        conventions: Vec::new(),
        tokens: text.tokens.clone(),
        document_starts: text.document_starts.clone(),
        windows,
        max_length,
        stride,
        n_tokens: text.tokens.len(),
        bos: text.bos.clone(),
        text_hash: text.text_hash.clone(),
        tokenizer_hash: text.tokenizer_hash.clone(),
        n_documents: None,
        units: None,
    }
}

fn strided(
    settings: &Settings<'_>,
    text: &TokenizedText,
    max_length: usize,
    stride: usize,
) -> Result<Pass, StageError> {
    let n_tokens = text.tokens.len();
    if n_tokens < max_length && !settings.allow_short {
        let reason = format!(
            "{n_tokens} tokens are less than one window of max_length {max_length}; take a longer text, a smaller max_length, or allow_short: true"
        );
        return Err(StageError::Param { param: "text".to_owned(), reason });
    }
    let windows = windows(n_tokens, max_length, stride).map_err(|error| text_error(&error))?;
    Ok(pass(Cut::Strided { max_length, stride }, text, windows, max_length, stride))
}

/// llama.cpp puts BOS in the place of each chunk's first token where the tokenizer adds one.
fn halves(text: &TokenizedText, n_ctx: usize) -> Result<Pass, StageError> {
    let windows = half_windows(text.tokens.len(), n_ctx).map_err(|error| text_error(&error))?;
    let mut pass = pass(Cut::Halves { n_ctx }, text, windows, n_ctx, n_ctx);
    if let Some(bos) = text.bos_id {
        for window in &pass.windows {
            pass.tokens[window.begin] = bos;
        }
        pass.bos = format!("in place of each chunk's first token (id {bos})");
    }
    Ok(pass)
}

/// lm-evaluation-harness scores every token of every document, the first from a prefix token.
fn rolling(
    settings: &Settings<'_>,
    whole: &TokenizedText,
    text: &TextForModel<'_>,
    max_length: usize,
) -> Result<Pass, StageError> {
    let documents = text.documents(settings.add_bos_token)?;
    let (mut tokens, mut windows, mut n_tokens, mut document_starts) = (Vec::new(), Vec::new(), 0, Vec::new());
    for document in documents.documents.iter().filter(|document| !document.is_empty()) {
        windows.extend(rolling_windows(tokens.len(), document.len(), max_length));
        document_starts.push(tokens.len());
        tokens.push(documents.prefix_id);
        tokens.extend(document);
        n_tokens += document.len();
    }
    if windows.is_empty() {
        return Err(text_error(&MetricsError::TooShort { n_tokens }));
    }
    Ok(Pass {
        tokens,
        document_starts,
        n_tokens,
        bos: format!("before each document, not scored (id {})", documents.prefix_id),
        n_documents: Some(documents.documents.len()),
        units: Some(documents.units),
        ..pass(Cut::Rolling { max_length }, whole, windows, max_length, max_length)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scored_tokens_know_their_document_whatever_the_windows() {
        let text = TokenizedText {
            tokens: (0..20).collect(),
            text_hash: String::new(),
            tokenizer_hash: String::new(),
            bos: String::new(),
            bos_id: None,
            document_starts: vec![0, 7, 7, 12],
        };
        let strided = windows(20, 8, 4).expect("windows");
        let halved = half_windows(20, 8).expect("windows");
        for (windows, expected) in [
            (strided, [vec![0; 6], vec![2; 5], vec![3; 8]].concat()),
            // Targets 5 to 7 and 13 to 15.
            (halved, vec![0, 0, 2, 3, 3, 3]),
        ] {
            let pass = pass(Cut::Halves { n_ctx: 8 }, &text, windows, 8, 8);
            let found: Vec<u32> = pass.windows.iter().flat_map(|window| pass.document_idx(window)).collect();
            assert_eq!(found, expected);
        }
    }
}
