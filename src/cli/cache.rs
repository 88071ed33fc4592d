//! `cache ls|verify|gc`.

use super::args::{CacheAction, Global};
use super::error::CliError;
use super::print;
use crate::store::Store;
use crate::ui::table;
use crate::units::format_bytes;
use std::time::Duration;

const DAY: Duration = Duration::from_secs(86_400);

/// Looks after the cache.
pub fn cache(global: &Global, action: &CacheAction) -> Result<u8, CliError> {
    let store = Store::open(&global.cache)?;
    match action {
        CacheAction::Ls => list(&store),
        CacheAction::Verify => verify(&store),
        CacheAction::Gc { dry_run, older_than } => {
            let days = u32::try_from(*older_than).unwrap_or(u32::MAX);
            let report = store.gc(&global.results, DAY.saturating_mul(days), *dry_run)?;
            let bytes: u64 = report.removed.iter().map(|(_, bytes, _)| bytes).sum();
            let word = if *dry_run { "would remove" } else { "removed" };
            let mut text: String = report
                .removed
                .iter()
                .map(|(name, bytes, why)| format!("{word} {name:.24} ({}): {why}\n", format_bytes(*bytes)))
                .collect();
            text.push_str(&format!(
                "{word} {} ({}), {} kept",
                report.removed.len(),
                format_bytes(bytes),
                report.n_kept
            ));
            print(&text)?;
            Ok(0)
        }
    }
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

fn verify(store: &Store) -> Result<u8, CliError> {
    let verdicts = store.verify()?;
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
