//! `cache ls|verify|gc`.

use super::args::{CacheAction, Global};
use super::error::CliError;
use super::print;
use crate::event::{Event, Outcome};
use crate::run::StageProgress;
use crate::store::{GcRequest, Store, StoreError};
use crate::ui::{sink, table};
use crate::units::format_bytes;
use std::cell::Cell;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

const DAY: Duration = Duration::from_secs(86_400);

/// Looks after the cache.
pub fn cache(global: &Global, action: &CacheAction) -> Result<u8, CliError> {
    let store = Store::open(&global.cache)?;
    match action {
        CacheAction::Ls => list(&store),
        CacheAction::Verify => verify(global, &store),
        CacheAction::Gc { dry_run, older_than, max_size, force } => {
            let days = u32::try_from(*older_than).unwrap_or(u32::MAX);
            let request = GcRequest {
                results: &global.results,
                older_than: DAY.saturating_mul(days),
                max_bytes: *max_size,
                dry_run: *dry_run,
                force: *force,
            };
            gc(&store, &request)
        }
    }
}

fn gc(store: &Store, request: &GcRequest<'_>) -> Result<u8, CliError> {
    let is_told = Cell::new(false);
    let wait = || {
        if !is_told.replace(true) {
            let _ = writeln!(std::io::stderr(), "another labpipe looks up what is cached, or removes: waiting for it");
        }
        true
    };
    let report = store.gc(request, &wait).map_err(|error| match error {
        StoreError::References { .. } => CliError::Refused(error),
        other => CliError::Store(other),
    })?;
    for (path, reason) in &report.ignored {
        let _ = writeln!(std::io::stderr(), "warning: {} counts as referring to nothing: {reason}", path.display());
    }
    let bytes: u64 = report.removed.iter().map(|(_, bytes, _)| bytes).sum();
    let word = if request.dry_run { "would remove" } else { "removed" };
    let mut text: String = report
        .removed
        .iter()
        .map(|(name, bytes, why)| format!("{word} {name:.24} ({}): {why}\n", format_bytes(*bytes)))
        .collect();
    if report.n_leftovers > 0 {
        text.push_str(&format!("{word} {} small files without a use\n", report.n_leftovers));
    }
    text.push_str(&format!(
        "{word} {} ({}), {} kept ({})",
        report.removed.len(),
        format_bytes(bytes),
        report.n_kept,
        format_bytes(report.kept_bytes)
    ));
    if report.n_in_use > 0 {
        text.push_str(&format!(", {} of them in use", report.n_in_use));
    }
    if let Some(max_bytes) = request.max_bytes.filter(|max_bytes| report.kept_bytes > *max_bytes) {
        text.push_str(&format!("\nmore than {} is left: it is in use, or too young to go", format_bytes(max_bytes)));
    }
    print(&text)?;
    Ok(0)
}

fn list(store: &Store) -> Result<u8, CliError> {
    let mut artifacts = store.list()?;
    artifacts.sort_by(|a, b| {
        (&a.0.pipeline, &a.0.created_at, &a.0.stage).cmp(&(&b.0.pipeline, &b.0.created_at, &b.0.stage))
    });
    let mut table = table(["key", "pipeline", "stage", "kind", "size", "created (UTC)"]);
    for (manifest, bytes) in &artifacts {
        let key: String = manifest.key.chars().take(12).collect();
        table.add_row([
            &key,
            &manifest.pipeline,
            &manifest.stage,
            &manifest.kind,
            &format_bytes(*bytes),
            &manifest.created_at,
        ]);
    }
    let total: u64 = artifacts.iter().map(|(_, bytes)| bytes).sum();
    print(&format!("{table}\n{} artifacts, {}", artifacts.len(), format_bytes(total)))?;
    Ok(0)
}

fn verify(global: &Global, store: &Store) -> Result<u8, CliError> {
    let events = sink(global.log_format(), global.level());
    // Ctrl-C ends the process: there is nothing to tidy up.
    let progress = StageProgress::new("cache", Arc::clone(&events), Arc::default());
    let (stage, kind, start) = ("cache".to_owned(), "verify".to_owned(), Instant::now());
    events.emit(Event::StageStarted { stage: stage.clone(), kind: kind.clone() });
    let verdicts = store.verify(&progress)?;
    let summary = format!("{} artifacts", verdicts.len());
    let duration_s = start.elapsed().as_secs_f64();
    events.emit(Event::StageFinished { stage, kind, outcome: Outcome::Done, duration_s, summary });
    let damaged: Vec<String> = verdicts
        .iter()
        .filter_map(|verdict| {
            Some(format!("damaged: {} {}: {}", &verdict.key[..12], verdict.stage, verdict.damage.as_ref()?))
        })
        .collect();
    let mut text = damaged.join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(&format!("{} artifacts, {} damaged", verdicts.len(), damaged.len()));
    print(&text)?;
    Ok(if damaged.is_empty() { 0 } else { 5 })
}
