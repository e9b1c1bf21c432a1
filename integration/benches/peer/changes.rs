//! Changes of endpoints, from the API to the kernel.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kube::Client;
use portcullis_integration::lab::Host;
use tokio::task::JoinSet;

use crate::cluster::{Cluster, slice};
use crate::fill::replace;
use crate::markdown::as_f64;
use crate::observe::{Fresh, Observer};
use crate::outcome::{Changes, Distribution};
use crate::proxy::Running;

/// How long the kernel may take to get a change.
pub const LIMIT: Duration = Duration::from_secs(10 * 60);
/// Requests that are under way at most.
const UNDER_WAY: usize = 64;
/// Steps from one changed Service to the next: a prime, so that all of them have their turn.
const STRIDE: usize = 7919;

/// How changes are made.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Each when the kernel has got the one before, and a pause is over. As many as `most`, fewer
    /// if they take longer than `budget` in all.
    Single {
        /// How many.
        most: usize,
        /// For how long.
        budget: Duration,
        /// How long the proxy is left alone before each.
        pause: Duration,
    },
    /// So many a second, for a time.
    Rate(u32, Duration),
}

/// Who changes endpoints.
pub struct Changer<'a> {
    /// A client of the API server.
    pub client: Client,
    /// The cluster.
    pub cluster: Cluster,
    /// The pods that exist.
    pub pods: &'a [Host],
    /// Addresses that no endpoint has had.
    pub fresh: &'a mut Fresh,
    /// The Service whose turn is next.
    pub turn: usize,
}

/// A change that was made.
#[derive(Clone, Copy)]
struct Made {
    service: usize,
    address: Ipv4Addr,
    sent: Instant,
    answered: Instant,
}

impl Changer<'_> {
    /// Changes endpoints at a pace and tells when the kernel got them.
    ///
    /// # Errors
    /// When the API server refuses, or the kernel does not get a change within ten minutes.
    pub async fn measure(
        &mut self,
        pace: Pace,
        observer: &Observer,
        proxy: &Running,
    ) -> Result<Changes> {
        let (heard, cpu) = (observer.heard(), proxy.cpu_seconds()?);
        let began = Instant::now();
        let made = match pace {
            Pace::Single { most, budget, pause } => {
                self.one_at_a_time(most, budget, pause, observer).await
            }
            Pace::Rate(rate, time) => self.at_a_rate(rate, time).await,
        }?;
        let sending = began.elapsed();
        let (from_sending, from_answer) =
            arrivals(&made, observer).with_context(|| proxy.tail())?;
        let after = observer.heard();
        Ok(Changes {
            rate: match pace {
                Pace::Single { .. } => None,
                Pace::Rate(rate, _) => Some(rate),
            },
            per_second: as_f64(made.len()) / sending.as_secs_f64(),
            count: made.len(),
            from_sending: Distribution::of(from_sending),
            from_answer: Distribution::of(from_answer),
            cpu_seconds: proxy.cpu_seconds()? - cpu,
            operations: after.changes - heard.changes,
            transactions: after.transactions - heard.transactions,
        })
    }

    /// Changes an endpoint of one Service and gives its new address.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn change_one(&mut self) -> Result<Ipv4Addr> {
        let (service, endpoints) = self.next()?;
        let slice = slice(service, &endpoints, self.pods)?;
        replace(&self.client, &slice).await?;
        Ok(endpoints[0])
    }

    async fn one_at_a_time(
        &mut self,
        most: usize,
        budget: Duration,
        pause: Duration,
        observer: &Observer,
    ) -> Result<Vec<Made>> {
        let mut made = Vec::new();
        let began = Instant::now();
        while made.len() < most && (made.len() < 3 || began.elapsed() < budget) {
            tokio::time::sleep(pause).await;
            let (service, endpoints) = self.next()?;
            let slice = slice(service, &endpoints, self.pods)?;
            let sent = Instant::now();
            replace(&self.client, &slice).await?;
            let (answered, address) = (Instant::now(), endpoints[0]);
            observer.wait_for(address, answered + LIMIT)?;
            made.push(Made { service, address, sent, answered });
        }
        Ok(made)
    }

    async fn at_a_rate(&mut self, rate: u32, time: Duration) -> Result<Vec<Made>> {
        let mut under_way = JoinSet::new();
        let mut made = Vec::new();
        let step = Duration::from_secs(1) / rate;
        let mut due = tokio::time::Instant::now();
        let end = due + time;
        while due < end {
            tokio::time::sleep_until(due).await;
            while under_way.len() >= UNDER_WAY {
                made.extend(under_way.join_next().await.transpose()?.transpose()?);
            }
            if tokio::time::Instant::now() >= end {
                break; // The API server is slower than that.
            }
            let (service, endpoints) = self.next()?;
            let slice = slice(service, &endpoints, self.pods)?;
            let client = self.client.clone();
            under_way.spawn(async move {
                let sent = Instant::now();
                replace(&client, &slice).await?;
                let (answered, address) = (Instant::now(), endpoints[0]);
                anyhow::Ok(Made { service, address, sent, answered })
            });
            due += step;
        }
        while let Some(ended) = under_way.join_next().await {
            made.push(ended??);
        }
        made.sort_by_key(|made| made.sent);
        Ok(made)
    }

    /// The Service whose turn it is, with a new address as its first endpoint.
    fn next(&mut self) -> Result<(usize, Vec<Ipv4Addr>)> {
        let service = loop {
            self.turn = (self.turn + STRIDE) % self.cluster.services;
            if !self.cluster.probed().contains(&self.turn) {
                break self.turn;
            }
        };
        let mut endpoints = self.cluster.endpoints_of(service, self.pods);
        endpoints[0] = self.fresh.address()?;
        Ok((service, endpoints))
    }
}

/// Waits until the kernel has got all changes and gives how long each took, from its sending and
/// from its answer. A change that another one of the same Service overtook is in force with that.
fn arrivals(made: &[Made], observer: &Observer) -> Result<(Vec<f64>, Vec<f64>)> {
    let deadline = Instant::now() + LIMIT;
    let mut newest: HashMap<usize, Instant> = HashMap::new();
    let (mut from_sending, mut from_answer) = (Vec::new(), Vec::new());
    for made in made.iter().rev() {
        let at = match newest.get(&made.service) {
            Some(later) => observer.since(made.address).map_or(*later, |at| at.min(*later)),
            None => observer.wait_for(made.address, deadline)?,
        };
        newest.insert(made.service, at);
        from_sending.push(between(made.sent, at));
        from_answer.push(between(made.answered, at));
    }
    Ok((from_sending, from_answer))
}

/// Seconds, negative where `to` was first.
fn between(from: Instant, to: Instant) -> f64 {
    match to.checked_duration_since(from) {
        Some(later) => later.as_secs_f64(),
        None => -from.duration_since(to).as_secs_f64(),
    }
}
