//! Which model is on the device: one at a time, lent to one stage at a time. So a model and its baseline never sit in a small
//! card's memory together, and a measuring stage has only its own model there.

use crate::artifact::Execution;
use crate::event::{Level, Progress};
use crate::inference::{Engine, InferenceError, Model, ModelRecipe};
use crate::stage::{ModelLease, ModelPool};
use crate::units::{format_bytes, format_seconds};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The device's one place for a model.
pub struct Residency {
    engine: Arc<dyn Engine>,
    slot: Mutex<Option<Resident>>,
}

struct Resident {
    recipe: ModelRecipe,
    model: Box<dyn Model>,
}

impl Residency {
    pub fn new(engine: Arc<dyn Engine>) -> Residency {
        Residency { engine, slot: Mutex::new(None) }
    }

    /// Returns how the model of a recipe was run, where it is still here and not lent.
    pub fn execution_of(&self, recipe: &ModelRecipe) -> Option<Execution> {
        let slot = self.slot.try_lock().ok()?;
        slot.as_ref().filter(|resident| resident.recipe.is_same_model(recipe))?.model.execution()
    }

    /// Drops the model unless it is one of `needed`, or lent.
    pub fn retain(&self, needed: &[ModelRecipe]) {
        if let Ok(mut slot) = self.slot.try_lock()
            && slot.as_ref().is_some_and(|resident| !needed.iter().any(|recipe| recipe.is_same_model(&resident.recipe)))
        {
            *slot = None;
        }
    }
}

struct Lease<'a> {
    slot: MutexGuard<'a, Option<Resident>>,
}

impl Deref for Lease<'_> {
    type Target = dyn Model + 'static;

    fn deref(&self) -> &Self::Target {
        match self.slot.as_ref() {
            Some(resident) => resident.model.as_ref(),
            None => unreachable!("a lease is made with a model in its slot"),
        }
    }
}

impl DerefMut for Lease<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match self.slot.as_mut() {
            Some(resident) => resident.model.as_mut(),
            None => unreachable!("a lease is made with a model in its slot"),
        }
    }
}

impl ModelPool for Residency {
    fn acquire(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<ModelLease<'_>, InferenceError> {
        // A stage that panicked with the model in hand leaves it in an unknown state.
        let mut slot = self.slot.lock().unwrap_or_else(|poisoned| {
            self.slot.clear_poison();
            let mut slot: MutexGuard<'_, Option<Resident>> = PoisonError::into_inner(poisoned);
            *slot = None;
            slot
        });
        if slot.as_ref().is_none_or(|resident| !resident.recipe.is_same_model(recipe)) {
            // The old model goes before the new one comes: never both.
            *slot = None;
            let start = Instant::now();
            let model = self.engine.open(recipe, progress)?;
            let (took, bytes) = (format_seconds(start.elapsed().as_secs_f64()), format_bytes(model.weights_bytes()));
            progress.note(Level::Debug, &format!("model loaded in {took}, {bytes} of weights"));
            *slot = Some(Resident { recipe: recipe.clone(), model });
        } else if let Some(resident) = slot.as_mut() {
            // What the last stage needed beside weights is not this one's.
            resident.model.release();
        }
        Ok(Box::new(Lease { slot }))
    }
}
