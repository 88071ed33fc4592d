//! What stages that do not measure tell of memory all the same: a note, no figure of their record.

use crate::event::Level;
use crate::inference::{MemoryProbe, Model};
use crate::stage::StageContext;
use crate::units::format_bytes;

/// Notes what the stage took at its peak, seen by a probe that was started when its model was there.
pub fn note_peak(context: &StageContext<'_>, probe: Box<dyn MemoryProbe>, model: &dyn Model) {
    let seen = probe.finish().of_model(model.weights_bytes(), model.kv_cache_bytes());
    if let (Some(all), Some(rest)) = (seen.memory_bytes, seen.memory_rest_bytes) {
        let text = format!("peak memory {}, {} of it beside weights and cache", format_bytes(all), format_bytes(rest));
        context.progress.note(Level::Debug, &text);
    }
}
