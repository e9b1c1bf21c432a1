//go:build upstream

// Our part of upstream's package: it writes down what its servers know and what they answer. The
// rest of the package comes from upstream's module, by way of an overlay.
package healthcheck

import (
	"cmp"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"portcullis.dev/integration/upstream/record"
)

// A check is a question about a Service, and the answer.
type check struct {
	Test string `json:"test"`
	Line string `json:"line"`
	// All Services that the server knows of.
	Services []service `json:"services"`
	// Where the server listens.
	Listening []string `json:"listening"`
	// Whether the proxy as a whole is healthy.
	ProxyHealthy bool `json:"proxyHealthy"`
	// Who is asked about, and the answer.
	Service string            `json:"service"`
	Status  int               `json:"status"`
	Headers map[string]string `json:"headers"`
	Body    json.RawMessage   `json:"body"`
}

type service struct {
	Name           string `json:"name"`
	Port           uint16 `json:"port"`
	LocalEndpoints int    `json:"localEndpoints"`
}

func recordService(
	server *server, asked types.NamespacedName, status, endpoints int, healthy bool, t *testing.T,
) {
	one := check{
		Test:         record.Test(t),
		Line:         record.CallOf("recordService", "tHandler", "testHandler", "testHandlerWithHealth"),
		Listening:    sets.List(server.listener.(*fakeListener).openPorts),
		ProxyHealthy: healthy,
		Service:      asked.String(),
		Status:       status,
		Headers:      map[string]string{},
	}
	for name, instance := range server.services {
		one.Services = append(one.Services, service{name.String(), instance.port, instance.endpoints})
	}
	slices.SortFunc(one.Services, func(a, b service) int { return cmp.Compare(a.Name, b.Name) })
	question, err := http.NewRequest(http.MethodGet, "/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	server.services[asked].httpServers[0].(*fakeHTTPServer).handler.ServeHTTP(answer, question)
	for name, values := range answer.Header() {
		one.Headers[strings.ToLower(name)] = strings.Join(values, ", ")
	}
	one.Body = answer.Body.Bytes()
	record.Write(t, one)
}

func observeQuestion(test *serverTest, status int, answer ProxyHealth) {
	var server *ProxyHealthServer
	switch handler := test.server.(*fakeHTTPServer).handler.(type) {
	case healthzHandler:
		server = handler.hs
	case livezHandler:
		server = handler.hs
	}
	known := server.nodeManager.Node().DeepCopy()
	if known.DeletionTimestamp != nil {
		// Whenever it was.
		known.DeletionTimestamp = &metav1.Time{Time: time.Unix(1e9, 0).UTC()}
	}
	one := question{
		Line:         record.CallOf("observeQuestion", "testHTTPHandler"),
		Path:         string(test.url),
		Node:         node{known.ObjectMeta, known.Spec},
		Status:       status,
		Healthy:      answer.Healthy,
		NodeEligible: answer.NodeEligible,
		UpdatedNow:   answer.LastUpdated.Equal(answer.CurrentTime),
		Families:     map[v1.IPFamily]bool{},
	}
	for family, health := range answer.Status {
		one.Families[family] = health.Healthy
	}
	observe(server, event{Question: &one})
}

func recordLife(t *testing.T, server *ProxyHealthServer) {
	lives[server].Test = record.Test(t)
	record.Write(t, lives[server])
}
