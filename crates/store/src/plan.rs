//! One memory budget shared out: what a model needs at any rate, and slots for its routed experts.
//!
//! Pure arithmetic on numbers that the layers above know. What is decided here changes speed and never a bit of the
//! output: the size of a pass and the choice of kernels are inputs, not results.

use crate::budget::Available;

/// Routed experts of one size: a slot of a class holds any expert of its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeClass {
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Layers whose experts are of this size.
    pub layers: usize,
}

/// What the layers above need, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The program itself: code, stacks, the file's header, the vocabulary.
    pub program_bytes: u64,
    /// Weights that every token uses.
    pub static_bytes: u64,
    /// Tokens of context.
    pub context_tokens: usize,
    /// A session's state when it has seen as many.
    pub state_bytes: u64,
    /// Rows of the largest pass.
    pub pass_rows: usize,
    /// Activations of such a pass.
    pub pass_bytes: u64,
    /// What is in memory only when nothing streams: all routed experts, and what else is then loaded whole.
    pub resident_bytes: u64,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that a token uses in a layer.
    pub experts_used: usize,
    /// Sizes of experts.
    pub classes: Vec<SizeClass>,
}

/// How much memory slots may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// As many slots as fit in so many bytes.
    Bytes(u64),
    /// So many slots, of all classes together.
    Slots(u64),
}

/// What was asked for. Nothing at all leaves everything to the plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Most bytes for everything.
    pub memory_bytes: Option<u64>,
    /// Room for slots.
    pub cache: Option<Cache>,
    /// Stream even if everything fits.
    pub stream: bool,
}

/// Where routed experts will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Residency {
    /// All in memory.
    Resident,
    /// In as many slots, class by class, read when they are needed.
    Streamed {
        /// Slots of each class, in the order of [`Needs::classes`].
        slots: Vec<usize>,
    },
}

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// [`Needs::program_bytes`].
    Program,
    /// [`Needs::static_bytes`].
    StaticWeights,
    /// [`Needs::state_bytes`].
    State {
        /// Tokens it has room for.
        tokens: usize,
    },
    /// [`Needs::pass_bytes`].
    Pass {
        /// Its rows.
        rows: usize,
    },
    /// [`Needs::resident_bytes`].
    ResidentExperts,
    /// Slots of one size class.
    Slots {
        /// How many.
        slots: usize,
        /// Experts of the class.
        experts: usize,
        /// Bytes of one.
        slot_bytes: u64,
    },
}

/// Something to say about a plan that works.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// Less than one token's experts.
    #[error(
        "{slots} expert {} fewer than the {wanted} experts that one token uses, so that no token finds what the one \
             before it used: it works, and is slow. {more_bytes} bytes more would hold them",
             if *.slots == 1 { "slot is" } else { "slots are" }
    )]
    FewSlots {
        /// Slots of the plan.
        slots: usize,
        /// Experts used times layers.
        wanted: usize,
        /// What is missing, in bytes.
        more_bytes: u64,
    },
    /// More than the system has to give.
    #[error(
        "{total_bytes} bytes are planned, but the system can give {available_bytes} (says {according_to}): \
             it may swap, or end the program"
    )]
    MoreThanAvailable {
        /// The plan's total.
        total_bytes: u64,
        /// What there is.
        available_bytes: u64,
        /// Who says so.
        according_to: String,
    },
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The limit is too low for what must be there.
    #[error("at most {limit_bytes} bytes of memory may be used ({limit_is}), but {smallest_bytes} are needed: \
             {fixed_bytes} for weights that every token uses, the context and a pass, the rest for {slots} expert {}. \
             Allow at least {smallest_bytes} bytes, ask for a shorter context{}, or end other programs",
            if *.slots == 1 { "slot" } else { "slots" }, if *.is_cache_fixed { " or a smaller cache" } else { "" })]
    TooSmall {
        /// What may be used.
        limit_bytes: u64,
        /// Where that comes from.
        limit_is: String,
        /// The least total that works.
        smallest_bytes: u64,
        /// What of it is no slots.
        fixed_bytes: u64,
        /// Slots in it.
        slots: usize,
        /// Whether the number of slots was asked for.
        is_cache_fixed: bool,
    },
    /// Fewer slots than classes.
    #[error("a cache of {asked} cannot hold an expert of each size: the least is {} ({smallest_bytes} bytes), one for \
             each of the model's sizes of experts", if *.classes == 1 { "1 slot".into() } else { format!("{classes} slots") })]
    CacheTooSmall {
        /// What was asked for.
        asked: String,
        /// Size classes.
        classes: usize,
        /// One slot of each.
        smallest_bytes: u64,
    },
}

/// What is to be allocated for a model: a bound that holds from loading to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Where routed experts will be.
    pub residency: Residency,
    /// Everything that takes memory.
    pub items: Vec<(Purpose, u64)>,
    /// What the total had to stay within, and why; `None` where there was no limit to go by.
    pub limit: Option<(u64, String)>,
    /// What to tell the user.
    pub warnings: Vec<Warning>,
}

/// What the system says it can give is out by this part of it: pages of tables and of the program's own file come and go.
const AVAILABLE_WITHIN: u64 = 1000;

/// Of the memory that the system can give, an automatic plan takes 7 of 8 parts: the rest is for what other programs
/// will want, and for the file cache (docs/spec/streaming.md §2).
const AUTOMATIC_SHARE: (u64, u64) = (7, 8);

impl Plan {
    /// Shares memory out. `available` is what the system can give now, if it says so.
    ///
    /// # Errors
    /// [`PlanError`] if what was asked for, or what there is, is less than the least that works.
    pub fn new(needs: &Needs, request: Request, available: Option<&Available>) -> Result<Plan, PlanError> {
        let limit = limit(request, available);
        let within = |bytes: u64| limit.as_ref().is_none_or(|(limit, _)| bytes <= *limit);
        let mut plan =
            Plan { residency: Residency::Resident, items: needs.fixed(), limit: limit.clone(), warnings: vec![] };
        plan.items.push((Purpose::ResidentExperts, needs.resident_bytes));
        if request.stream || request.cache.is_some() || !within(plan.total_bytes()) {
            let slots = needs.streamed(request, limit)?;
            plan.items = needs.fixed();
            plan.items.extend(needs.slot_items(&slots));
            plan.warnings.extend(needs.few_slots(&slots));
            plan.residency = Residency::Streamed { slots };
        }
        // What the process holds already is in the plan's total, as part of the program.
        let (total_bytes, held_at_most) = (plan.total_bytes(), needs.program_bytes);
        let own = |available: &Available| available.bytes + available.held_bytes.min(held_at_most);
        let is_short = |available: &&Available| total_bytes - total_bytes / AVAILABLE_WITHIN > own(available);
        if let Some(available) = available.filter(is_short) {
            let (available_bytes, according_to) = (own(available), available.according_to.display().to_string());
            plan.warnings.push(Warning::MoreThanAvailable { total_bytes, available_bytes, according_to });
        }
        Ok(plan)
    }

    /// Sum of all items.
    pub fn total_bytes(&self) -> u64 {
        self.items.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// The number to stay within, and where it comes from.
fn limit(request: Request, available: Option<&Available>) -> Option<(u64, String)> {
    let (taken, of) = AUTOMATIC_SHARE;
    let automatic = available.map(|Available { bytes, according_to, .. }| {
        let share = (u128::from(*bytes) * u128::from(taken) / u128::from(of)) as u64;
        (share, format!("{taken}/{of} of the {bytes} that {} says are free", according_to.display()))
    });
    request.memory_bytes.map(|bytes| (bytes, "as asked".to_owned())).or(automatic)
}

impl Needs {
    /// What is needed wherever experts are.
    fn fixed(&self) -> Vec<(Purpose, u64)> {
        vec![
            (Purpose::Program, self.program_bytes),
            (Purpose::StaticWeights, self.static_bytes),
            (Purpose::State { tokens: self.context_tokens }, self.state_bytes),
            (Purpose::Pass { rows: self.pass_rows }, self.pass_bytes),
        ]
    }

    /// Slots of each class.
    fn streamed(&self, request: Request, limit: Option<(u64, String)>) -> Result<Vec<usize>, PlanError> {
        let least = vec![1; self.classes.len()];
        let cache_too_small = |asked: String| {
            let smallest_bytes = self.slots_bytes(&least);
            Err(PlanError::CacheTooSmall { asked, classes: least.len(), smallest_bytes })
        };
        let asked = match request.cache {
            Some(Cache::Slots(slots)) if slots < least.len() as u64 => {
                return cache_too_small(format!("{slots} slots"));
            }
            Some(Cache::Bytes(bytes)) if bytes < self.slots_bytes(&least) => {
                return cache_too_small(format!("{bytes} bytes"));
            }
            Some(Cache::Slots(slots)) => Some(self.share(|shared, _| (shared.iter().sum::<usize>() as u64) < slots)),
            Some(Cache::Bytes(bytes)) => Some(self.share_bytes(bytes)),
            None => None,
        };
        let Some((limit_bytes, limit_is)) = limit else {
            return Ok(asked.unwrap_or_else(|| self.share(|_, _| true)));
        };
        let fixed_bytes = self.fixed().iter().map(|(_, bytes)| bytes).sum::<u64>();
        let is_cache_fixed = asked.is_some();
        let smallest = asked.as_deref().unwrap_or(&least);
        let smallest_bytes = fixed_bytes + self.slots_bytes(smallest);
        if smallest_bytes > limit_bytes {
            let slots = smallest.iter().sum();
            return Err(PlanError::TooSmall {
                limit_bytes,
                limit_is,
                smallest_bytes,
                fixed_bytes,
                slots,
                is_cache_fixed,
            });
        }
        Ok(asked.unwrap_or_else(|| self.share_bytes(limit_bytes - fixed_bytes)))
    }

    /// Slots that hold exactly the experts of one token.
    fn of_one_token(&self) -> Vec<usize> {
        self.classes.iter().map(|class| class.layers * self.experts_used).collect()
    }

    fn slots_bytes(&self, slots: &[usize]) -> u64 {
        slots.iter().zip(&self.classes).map(|(&slots, class)| slots as u64 * class.slot_bytes).sum()
    }

    /// As many slots as fit in `bytes`, where one of each class is known to.
    fn share_bytes(&self, bytes: u64) -> Vec<usize> {
        self.share(|slots, next| self.slots_bytes(slots) + self.classes[next].slot_bytes <= bytes)
    }

    fn share(&self, may_add: impl Fn(&[usize], usize) -> bool) -> Vec<usize> {
        let layers: Vec<usize> = self.classes.iter().map(|class| class.layers).collect();
        share(&layers, self.experts, may_add)
    }

    fn slot_items<'a>(&'a self, slots: &'a [usize]) -> impl Iterator<Item = (Purpose, u64)> + 'a {
        slots.iter().zip(&self.classes).map(|(&slots, class)| {
            let (slot_bytes, experts) = (class.slot_bytes, class.layers * self.experts);
            (Purpose::Slots { slots, experts, slot_bytes }, slots as u64 * slot_bytes)
        })
    }

    fn few_slots(&self, slots: &[usize]) -> Option<Warning> {
        let one_token = self.of_one_token();
        let (found, wanted) = (slots.iter().sum(), one_token.iter().sum());
        let more_bytes = self.slots_bytes(&one_token).saturating_sub(self.slots_bytes(slots));
        (found < wanted).then_some(Warning::FewSlots { slots: found, wanted, more_bytes })
    }
}

/// Shares `slots` slots over size classes as a plan does; `layers` of each class have `experts` experts each.
pub fn share_slots(layers: &[usize], experts: usize, slots: u64) -> Vec<usize> {
    share(layers, experts, |shared, _| (shared.iter().sum::<usize>() as u64) < slots)
}

/// One slot of each class, then one after the other, each to the class that has fewest for its layers (Sainte-Laguë's
/// method: growing never takes a slot away again), as long as `may_add` allows, and no class gets more than it has
/// experts.
fn share(layers: &[usize], experts: usize, may_add: impl Fn(&[usize], usize) -> bool) -> Vec<usize> {
    let mut slots = vec![1; layers.len()];
    loop {
        let with_room = (0..slots.len()).filter(|&class| slots[class] < layers[class] * experts);
        // The largest layers / (2 slots + 1); the first of equals.
        let next = with_room.reduce(|a, b| {
            let worth = |class: usize, other: usize| layers[class] * (2 * slots[other] + 1);
            if worth(b, a) > worth(a, b) { b } else { a }
        });
        match next {
            Some(next) if may_add(&slots, next) => slots[next] += 1,
            _ => return slots,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Flash in its published 2-bit layout, 32,768 tokens of context.
    fn flash() -> Needs {
        Needs {
            program_bytes: 64 * MIB,
            static_bytes: 8_400 * MIB,
            context_tokens: 32_768,
            state_bytes: 160 * MIB,
            pass_rows: 256,
            pass_bytes: 250 * MIB,
            resident_bytes: 77_913_391_104,
            experts: 256,
            experts_used: 6,
            classes: vec![SizeClass { slot_bytes: 7_090_176, layers: 43 }],
        }
    }

    fn available(bytes: u64) -> Option<Available> {
        Some(Available { bytes, held_bytes: 0, according_to: "proc/meminfo".into() })
    }

    fn plan(needs: &Needs, request: Request, free: Option<Available>) -> Result<Plan, PlanError> {
        let plan = Plan::new(needs, request, free.as_ref())?;
        if let Some((limit, _)) = &plan.limit {
            assert!(plan.total_bytes() <= *limit, "{plan:?}");
        }
        Ok(plan)
    }

    fn slots(plan: &Plan) -> &[usize] {
        match &plan.residency {
            Residency::Streamed { slots } => slots,
            Residency::Resident => panic!("resident: {plan:?}"),
        }
    }

    fn memory(mib: u64) -> Request {
        Request { memory_bytes: Some(mib * MIB), ..Request::default() }
    }

    #[test]
    fn everything_is_resident_where_it_fits() {
        let nothing = Request::default();
        assert_eq!(plan(&flash(), nothing, available(128 << 30)).unwrap().residency, Residency::Resident);
        assert_eq!(plan(&flash(), nothing, None).unwrap().residency, Residency::Resident);
        let streamed = Request { stream: true, ..nothing };
        assert_eq!(slots(&plan(&flash(), streamed, available(128 << 30)).unwrap()), [256 * 43]);
        // 87.4 GiB are too little for all, and so a cache takes what is left.
        let plan = plan(&flash(), nothing, available(90 << 30)).unwrap();
        let rest = (90 << 30) / 8 * 7 - (64 + 8_400 + 160 + 250) * MIB;
        assert_eq!(slots(&plan), [(rest / 7_090_176) as usize]);
        assert_eq!(plan.warnings, []);
    }

    #[test]
    fn fewer_slots_than_a_token_uses_are_warned_of() {
        let one_token = 258 * 7_090_176 / MIB + 1;
        let fixed = 64 + 8_400 + 160 + 250;
        let enough = plan(&flash(), memory(fixed + one_token), None).unwrap();
        assert_eq!((slots(&enough)[0], enough.warnings.len()), (258, 0));
        let few = plan(&flash(), memory(fixed + one_token - 2), None).unwrap();
        let [Warning::FewSlots { slots: 257, wanted: 258, more_bytes: 7_090_176 }] = few.warnings[..] else {
            panic!("{few:?}")
        };
        assert!(few.warnings[0].to_string().starts_with("257 expert slots are fewer than the 258"), "{few:?}");
    }

    #[test]
    fn too_little_is_refused_with_the_least_that_works() {
        let error = plan(&flash(), memory(8_000), None).unwrap_err();
        let PlanError::TooSmall { smallest_bytes, slots: 1, is_cache_fixed: false, .. } = error else {
            panic!("{error:?}")
        };
        assert!(error.to_string().contains(&format!("Allow at least {smallest_bytes} bytes")), "{error}");
        let asked = |memory_bytes| Request { memory_bytes: Some(memory_bytes), ..Request::default() };
        assert_eq!(slots(&plan(&flash(), asked(smallest_bytes), None).unwrap()), [1]);
        assert!(plan(&flash(), asked(smallest_bytes - 1), None).is_err());
        let automatic = plan(&flash(), Request::default(), available(4 << 30)).unwrap_err().to_string();
        assert!(automatic.contains("7/8 of the 4294967296 that proc/meminfo says are free"), "{automatic}");
    }

    #[test]
    fn a_cache_is_as_asked_or_refused() {
        let cache = |cache| Request { cache: Some(cache), ..Request::default() };
        let count = |request| plan(&flash(), request, available(64 << 30)).map(|plan| slots(&plan).to_vec());
        assert_eq!(count(cache(Cache::Slots(1))), Ok(vec![1]));
        assert_eq!(count(cache(Cache::Slots(1000))), Ok(vec![1000]));
        assert_eq!(count(cache(Cache::Bytes(7_090_176 * 3 - 1))), Ok(vec![2]));
        assert!(matches!(count(cache(Cache::Slots(0))), Err(PlanError::CacheTooSmall { .. })));
        assert!(matches!(count(cache(Cache::Bytes(7_090_175))), Err(PlanError::CacheTooSmall { .. })));
        let error = count(cache(Cache::Slots(20_000))).unwrap_err();
        assert!(matches!(error, PlanError::TooSmall { slots: 11_008, is_cache_fixed: true, .. }), "{error:?}");
        let both = Request { memory_bytes: Some(10 << 30), ..cache(Cache::Slots(300)) };
        assert!(matches!(count(both), Err(PlanError::TooSmall { is_cache_fixed: true, .. })));
    }

    #[test]
    fn more_than_there_is_is_said() {
        let plan = plan(&flash(), memory(16_384), available(10 << 30)).unwrap();
        assert!(matches!(plan.warnings[..], [Warning::MoreThanAvailable { .. }]), "{plan:?}");
    }

    /// All of a group's limit was asked for, a part of which the program itself took before the plan was made.
    #[test]
    fn what_the_program_holds_is_not_counted_twice() {
        let warned = |held_bytes| {
            let available = Available { bytes: (16 << 30) - 40 * MIB, held_bytes, according_to: "limit".into() };
            !Plan::new(&flash(), memory(16_384), Some(&available)).unwrap().warnings.is_empty()
        };
        assert_eq!([0, 10 * MIB, 40 * MIB].map(warned), [true, true, false]);
    }

    #[test]
    fn memory_that_is_short_by_next_to_nothing_is_not_warned_of() {
        let asked = plan(&flash(), memory(16_384), None).unwrap().total_bytes();
        let warnings = |short_bytes| {
            let available = available(asked - short_bytes);
            Plan::new(&flash(), memory(16_384), available.as_ref()).unwrap().warnings
        };
        assert_eq!(warnings(asked / 10_000), []);
        assert!(matches!(warnings(asked / 500)[..], [Warning::MoreThanAvailable { .. }]));
    }

    prop_compose! {
        fn any_needs()(
            numbers in prop::array::uniform4(0u64..5_000),
            classes in prop::collection::vec((1u64..50, 1usize..9), 1..4),
            experts in 1usize..12,
        ) -> Needs {
            let [program_bytes, static_bytes, state_bytes, pass_bytes] = numbers;
            let classes: Vec<SizeClass> =
                classes.into_iter().map(|(slot_bytes, layers)| SizeClass { slot_bytes, layers }).collect();
            let resident_bytes = classes.iter().map(|c| c.slot_bytes * (c.layers * experts) as u64).sum();
            Needs {
                program_bytes, static_bytes, context_tokens: 1, state_bytes, pass_rows: 1, pass_bytes, resident_bytes,
                experts, experts_used: experts.div_ceil(3), classes,
            }
        }
    }

    proptest! {
        /// A plan stays within its limit, more memory never gives fewer slots of any class, and the least that an error
        /// names is the least.
        #[test]
        fn any_limit_is_kept(needs in any_needs(), limit in 0u64..60_000) {
            let asked = |bytes| Request { memory_bytes: Some(bytes), stream: true, cache: None };
            match plan(&needs, asked(limit), None) {
                Err(PlanError::TooSmall { smallest_bytes, .. }) => {
                    prop_assert!(smallest_bytes > limit);
                    prop_assert!(plan(&needs, asked(smallest_bytes), None).is_ok());
                    prop_assert!(plan(&needs, asked(smallest_bytes - 1), None).is_err());
                }
                Err(error) => prop_assert!(false, "{error}"),
                Ok(one) => {
                    prop_assert!(slots(&one).iter().all(|&slots| slots >= 1));
                    let more = plan(&needs, asked(limit + 1), None).unwrap();
                    prop_assert!(slots(&one).iter().zip(slots(&more)).all(|(one, more)| one <= more));
                }
            }
        }

        /// Classes share by their layers: no class could give a slot to another and both be nearer their due.
        #[test]
        fn slots_are_shared_by_layers(needs in any_needs(), asked in 1u64..400) {
            let request = Request { cache: Some(Cache::Slots(asked)), ..Request::default() };
            let classes = needs.classes.len() as u64;
            let Ok(plan) = plan(&needs, request, None) else {
                prop_assert!(asked < classes);
                return Ok(());
            };
            let most: Vec<usize> = needs.classes.iter().map(|class| class.layers * needs.experts).collect();
            let found = slots(&plan);
            let total: usize = found.iter().sum();
            prop_assert_eq!(total as u64, asked.min(most.iter().sum::<usize>() as u64));
            for a in 0..found.len() {
                for b in 0..found.len() {
                    let density = |class: usize, slots: f64| slots / needs.classes[class].layers as f64;
                    let unfair = found[a] > 1 && found[b] < most[b]
                        && density(a, found[a] as f64 - 0.5) > density(b, found[b] as f64 + 0.5) + 1e-9;
                    prop_assert!(!unfair, "{found:?} of {:?}", needs.classes);
                }
            }
        }
    }
}
