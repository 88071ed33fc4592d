//! What a pipeline names on the Hugging Face hub is downloaded before it is planned: keys hold the content of files.

use super::error::CliError;
use super::workspace::Read;
use crate::event::{Event, EventSink, Outcome};
use crate::hub::{HubError, HubReference, HubSettings, fetch, locate};
use crate::run::{StageProgress, hub_references};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Downloads what is not in the cache yet.
///
/// # Errors
/// `Hub`, for the first thing that is not to be had.
pub fn download(read: &Read, root: &Path, events: &Arc<dyn EventSink>) -> Result<(), CliError> {
    let references = hub_references(&read.pipeline, &read.catalogue, root);
    references.iter().try_for_each(|reference| get(reference, &read.hub, events))?;
    Ok(())
}

fn get(reference: &HubReference, settings: &HubSettings, events: &Arc<dyn EventSink>) -> Result<(), HubError> {
    let (id, kind) = (reference.to_string(), "download".to_owned());
    let (was_there, start) = (locate(reference, settings).is_some(), Instant::now());
    let progress = StageProgress::new(&id, Arc::clone(events), Arc::new(AtomicBool::new(false)));
    if !was_there && !settings.is_offline {
        events.emit(Event::StageStarted { stage: id.clone(), kind: kind.clone() });
    }
    let result = fetch(reference, settings, &progress);
    if !was_there && !settings.is_offline {
        let (outcome, summary) = match &result {
            Ok(path) => (Outcome::Done, path.display().to_string()),
            Err(_) => (Outcome::Failed, "download".to_owned()),
        };
        let duration_s = start.elapsed().as_secs_f64();
        events.emit(Event::StageFinished { stage: id, kind, outcome, duration_s, summary });
    }
    result.map(|_| ())
}
