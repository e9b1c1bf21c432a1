//! Whether the API server answers: said once when it does not, and once when it does again, to the
//! log and to the watchers that wait for it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use futures::stream::{self, BoxStream, Stream, StreamExt};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher;
use tokio::sync::Notify;

/// The pause before an API server that does not answer is asked for the first time whether it does.
const FIRST_PROBE: Duration = Duration::from_secs(1);

/// The longest pause between two such questions, to which up to as much comes at random: every node
/// asks.
const LONGEST_PROBE: Duration = Duration::from_secs(10);

/// How long such a question may take.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);

/// A watcher, its pauses to come, its present pause, and what ends it.
type Pausing<T> = (
    BoxStream<'static, watcher::Result<T>>,
    watcher::DefaultBackoff,
    Option<Duration>,
    Arc<Outages>,
);

/// What is watched, as the log calls it.
pub(super) type Resource = &'static str;

/// What the watchers know of the API server.
#[derive(Debug, Default)]
pub(super) struct Outages {
    state: Mutex<State>,
    begun: Notify,
    over: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Since when it does not answer.
    silent: Option<Instant>,
    /// Watches that it answers with an error, of its own code.
    refused: BTreeMap<Resource, u16>,
}

/// What an error of a watcher means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// Nobody answers, or not now.
    Silent,
    /// The API server says no, with this HTTP status; 0 where it says nothing of use.
    Refused(u16),
    /// A watch was too old to be resumed, and begins anew.
    Expired,
}

/// What is new with that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Nothing,
    Worse,
    Better,
}

impl Outages {
    /// Takes what a watcher of `resource` tells, or how it failed.
    pub(super) fn take<T>(&self, resource: Resource, told: &watcher::Result<watcher::Event<T>>) {
        let mut state = self.state();
        match told {
            // It is about to ask, and has no answer yet.
            Ok(watcher::Event::Init) => {}
            Ok(_) => {
                let news = state.works(resource);
                log(news, resource, None);
                self.wake(news);
            }
            Err(error) => {
                let failure = Failure::of(error);
                let news = state.failed(resource, failure, Instant::now());
                log(news, resource, Some(error));
                drop(state);
                if failure == Failure::Silent {
                    self.begun.notify_one();
                }
            }
        }
    }

    /// Asks by `answers` whether the API server is back, for as long as it is not; for ever. A
    /// watcher alone would not do: it waits up to a minute before it tries again, and then says
    /// nothing until something changes.
    pub(super) async fn probe(&self, answers: impl AsyncFn() -> bool) -> Infallible {
        loop {
            while self.state().silent.is_none() {
                self.begun.notified().await;
            }
            let pauses = ExponentialBuilder::default()
                .with_min_delay(FIRST_PROBE)
                .with_max_delay(LONGEST_PROBE)
                .with_jitter()
                .without_max_times();
            for pause in pauses.build() {
                tokio::time::sleep(pause).await;
                if self.state().silent.is_none() {
                    break;
                }
                if let Ok(true) = tokio::time::timeout(PROBE_PATIENCE, answers()).await {
                    let news = self.state().answers();
                    log(news, "the API server", None);
                    self.wake(news);
                    break;
                }
            }
        }
    }

    /// Has a watcher pause after failures, and no longer than until the API server answers.
    pub(super) fn pausing<T: Send + 'static>(
        self: &Arc<Self>,
        watcher: impl Stream<Item = watcher::Result<T>> + Send + 'static,
    ) -> BoxStream<'static, watcher::Result<T>> {
        let start = (watcher.boxed(), watcher::DefaultBackoff::default(), None, Arc::clone(self));
        let next = async |(mut watcher, mut pauses, pause, outages): Pausing<T>| {
            if let Some(pause) = pause {
                let over = tokio::time::timeout(pause, outages.over.notified()).await;
                // The next failure is no more of that outage: often the API server has forgotten
                // what the watch wants to go on from, and everything is to be listed.
                if over.is_ok() {
                    pauses = watcher::DefaultBackoff::default();
                }
            }
            let told = watcher.next().await?;
            let pause = match &told {
                // It forgets former failures after some time without any.
                Ok(_) => {
                    pauses.reset();
                    None
                }
                Err(_) => pauses.next(),
            };
            Some((told, (watcher, pauses, pause, outages)))
        };
        stream::unfold(start, next).boxed()
    }

    fn wake(&self, news: News) {
        if news == News::Better {
            self.over.notify_waiters();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked, the state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn failed(&mut self, resource: Resource, failure: Failure, now: Instant) -> News {
        match failure {
            Failure::Expired => News::Nothing,
            Failure::Silent if self.silent.is_some() => News::Nothing,
            Failure::Silent => {
                self.silent = Some(now);
                News::Worse
            }
            Failure::Refused(code) => {
                self.silent = None;
                let known = self.refused.insert(resource, code) == Some(code);
                if known { News::Nothing } else { News::Worse }
            }
        }
    }

    fn works(&mut self, resource: Resource) -> News {
        let refused = self.refused.remove(resource).is_some();
        match (self.answers(), refused) {
            (News::Nothing, false) => News::Nothing,
            _ => News::Better,
        }
    }

    fn answers(&mut self) -> News {
        if self.silent.take().is_some() { News::Better } else { News::Nothing }
    }
}

impl Failure {
    fn of(error: &watcher::Error) -> Failure {
        use watcher::Error::{
            InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed,
        };
        match error {
            InitialListFailed(kube::Error::Api(status))
            | WatchStartFailed(kube::Error::Api(status))
            | WatchFailed(kube::Error::Api(status))
            | WatchError(status) => Failure::of_status(status.code),
            InitialListFailed(kube::Error::SerdeError(_))
            | WatchStartFailed(kube::Error::SerdeError(_))
            | WatchFailed(kube::Error::SerdeError(_))
            | NoResourceVersion => Failure::Refused(0),
            InitialListFailed(_) | WatchStartFailed(_) | WatchFailed(_) => Failure::Silent,
        }
    }

    fn of_status(code: u16) -> Failure {
        match code {
            410 => Failure::Expired,
            // It is starting, ending or overwhelmed.
            429 | 500.. => Failure::Silent,
            code => Failure::Refused(code),
        }
    }
}

fn log(news: News, resource: Resource, error: Option<&watcher::Error>) {
    let error = error.map(|error| error as &dyn std::error::Error);
    match news {
        News::Nothing => {
            if let Some(error) = error {
                tracing::debug!(resource, error, "a watch failed");
            }
        }
        News::Worse => {
            tracing::warn!(
                resource,
                error,
                "cannot watch the cluster: what is known stays in force"
            );
        }
        News::Better => tracing::info!(resource, "the cluster can be watched again"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use kube::core::Status;

    use super::*;

    #[test]
    fn each_outage_is_news_twice() {
        use Failure::{Expired, Refused, Silent};
        let mut state = State::default();
        // Failures, or `None` where a watch works.
        for (step, (resource, failure, expected)) in [
            ("Services", None, News::Nothing),
            ("Services", Some(Expired), News::Nothing),
            ("Services", Some(Silent), News::Worse),
            ("Services", Some(Silent), News::Nothing),
            ("Nodes", Some(Silent), News::Nothing),
            ("Nodes", None, News::Better),
            ("Services", None, News::Nothing),
            ("Nodes", Some(Refused(403)), News::Worse),
            ("Nodes", Some(Refused(403)), News::Nothing),
            ("Services", None, News::Nothing),
            ("Nodes", Some(Refused(401)), News::Worse),
            ("Nodes", Some(Silent), News::Worse),
            ("Nodes", Some(Refused(401)), News::Nothing),
            ("Nodes", None, News::Better),
            ("Nodes", None, News::Nothing),
        ]
        .into_iter()
        .enumerate()
        {
            let news = match failure {
                Some(failure) => state.failed(resource, failure, Instant::now()),
                None => state.works(resource),
            };
            assert_eq!(news, expected, "step {step}");
        }
        assert!(state.silent.is_none() && state.refused.is_empty());
    }

    #[test]
    fn a_question_is_no_answer() {
        let outages = Outages::default();
        let refused = kube::Error::ReadEvents(std::io::ErrorKind::ConnectionRefused.into());
        outages.take::<()>("Services", &Err(watcher::Error::InitialListFailed(refused)));
        outages.take::<()>("Services", &Ok(watcher::Event::Init));
        assert!(outages.state().silent.is_some());
        outages.take::<()>("Services", &Ok(watcher::Event::InitDone));
        assert!(outages.state().silent.is_none());
    }

    #[test]
    fn what_errors_mean() {
        let status = |code| Status { code, ..Status::default() }.boxed();
        for (code, expected) in [
            (410, Failure::Expired),
            (403, Failure::Refused(403)),
            (404, Failure::Refused(404)),
            (429, Failure::Silent),
            (503, Failure::Silent),
            (0, Failure::Refused(0)),
        ] {
            let list = watcher::Error::InitialListFailed(kube::Error::Api(status(code)));
            assert_eq!(Failure::of(&list), expected);
            assert_eq!(Failure::of(&watcher::Error::WatchError(status(code))), expected);
        }
        let broken = kube::Error::ReadEvents(std::io::ErrorKind::ConnectionReset.into());
        assert_eq!(Failure::of(&watcher::Error::WatchFailed(broken)), Failure::Silent);
        assert_eq!(Failure::of(&watcher::Error::NoResourceVersion), Failure::Refused(0));
    }

    #[tokio::test(start_paused = true)]
    async fn asks_until_it_answers() {
        let outages = Outages::default();
        let asked = AtomicUsize::new(0);
        let answers = async || match asked.fetch_add(1, Ordering::Relaxed) {
            0 => false,
            1 => std::future::pending().await,
            _ => true,
        };
        let refused = kube::Error::ReadEvents(std::io::ErrorKind::ConnectionRefused.into());
        outages.take::<()>("Services", &Err(watcher::Error::WatchStartFailed(refused)));
        assert!(outages.state().silent.is_some());
        let probing = tokio::time::timeout(LONGEST_PROBE * 100, outages.probe(answers));
        assert!(probing.await.is_err(), "it probes for ever");
        assert!(outages.state().silent.is_none());
        assert_eq!(asked.load(Ordering::Relaxed), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn watchers_wait_no_longer_than_the_outage() {
        let outages = Arc::new(Outages::default());
        let failure = || {
            let refused = kube::Error::ReadEvents(std::io::ErrorKind::ConnectionRefused.into());
            Err(watcher::Error::WatchStartFailed(refused))
        };
        let works = watcher::Event::Apply(());
        let told = stream::iter((0..9).map(move |_| failure())).chain(stream::iter([Ok(works)]));
        let mut watcher = Box::pin(outages.pausing(told));
        let start = tokio::time::Instant::now();
        for _ in 0..8 {
            outages.take("Services", &watcher.next().await.unwrap());
        }
        assert!(start.elapsed() > Duration::from_secs(30), "it pauses by itself");
        let start = tokio::time::Instant::now();
        let back = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let news = outages.state().answers();
            outages.wake(news);
        };
        let (told, ()) = tokio::join!(watcher.next(), back);
        assert!(matches!(told, Some(Err(_))));
        assert_eq!(start.elapsed().as_secs(), 1);
        // It is not held against the watcher what was before.
        assert!(matches!(watcher.next().await, Some(Ok(_))));
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
