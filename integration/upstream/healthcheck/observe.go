//go:build upstream

// Our part of upstream's package: it keeps what happens to each proxy. The rest of the package comes
// from upstream's module, by way of an overlay.
package healthcheck

import (
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A life is what happens to a proxy, and what it answers meanwhile.
type life struct {
	Test string `json:"test"`
	// After how many seconds a change that waits makes a proxy unhealthy.
	Patience float64 `json:"patience"`
	Events   []event `json:"events"`
}

type event struct {
	// Seconds since the first event.
	At float64 `json:"at"`
	// One of these: a change for a family waits, nothing waits for a family any more, a question.
	Queued   v1.IPFamily `json:"queued,omitempty"`
	Updated  v1.IPFamily `json:"updated,omitempty"`
	Question *question   `json:"question,omitempty"`
}

type question struct {
	Line string `json:"line"`
	Path string `json:"path"`
	Node node   `json:"node"`
	// The answer.
	Status       int   `json:"status"`
	Healthy      bool  `json:"healthy"`
	NodeEligible *bool `json:"nodeEligible"`
	// Whether the time of the last update is the time of the answer.
	UpdatedNow bool                 `json:"updatedNow"`
	Families   map[v1.IPFamily]bool `json:"families"`
}

// A node without its status.
type node struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
	Spec     v1.NodeSpec       `json:"spec"`
}

var (
	lives = map[*ProxyHealthServer]*life{}
	start = map[*ProxyHealthServer]time.Time{}
)

func observe(server *ProxyHealthServer, what event) {
	if lives[server] == nil {
		lives[server] = &life{Patience: server.healthTimeout.Seconds()}
		start[server] = server.clock.Now()
	}
	what.At = server.clock.Now().Sub(start[server]).Seconds()
	lives[server].Events = append(lives[server].Events, what)
}
