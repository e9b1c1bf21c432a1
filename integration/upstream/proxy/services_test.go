//go:build upstream

package proxy

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"testing"

	v1 "k8s.io/api/core/v1"
	"portcullis.dev/integration/upstream/record"
)

// A reading is a Service, and what a proxy of a family serves of it.
type reading struct {
	Test    string        `json:"test"`
	Line    string        `json:"line"`
	Family  v1.IPFamily   `json:"ipFamily"`
	Service *v1.Service   `json:"service"`
	Ports   []servicePort `json:"ports"`
}

type servicePort struct {
	Name                string      `json:"name"`
	Protocol            v1.Protocol `json:"protocol"`
	ClusterIP           string      `json:"clusterIP"`
	Port                int         `json:"port"`
	ExternalIPs         []string    `json:"externalIPs"`
	LoadBalancerIPs     []string    `json:"loadBalancerIPs"`
	SourceRanges        []string    `json:"sourceRanges"`
	HealthCheckNodePort int         `json:"healthCheckNodePort"`
}

func recordReading(
	t *testing.T, line int, family v1.IPFamily, object *v1.Service,
	expected map[ServicePortName]*BaseServicePortInfo,
) {
	one := reading{
		Test:    record.Test(t),
		Line:    fmt.Sprintf("servicechangetracker_test.go:%d", line),
		Family:  family,
		Service: object,
		Ports:   []servicePort{},
	}
	for name, port := range expected {
		one.Ports = append(one.Ports, servicePort{
			Name:                name.Port,
			Protocol:            name.Protocol,
			ClusterIP:           port.clusterIP.String(),
			Port:                port.port,
			ExternalIPs:         texts(port.externalIPs),
			LoadBalancerIPs:     texts(port.loadBalancerVIPs),
			SourceRanges:        texts(port.loadBalancerSourceRanges),
			HealthCheckNodePort: port.healthCheckNodePort,
		})
	}
	slices.SortFunc(one.Ports, func(a, b servicePort) int { return cmp.Compare(a.Name, b.Name) })
	record.Write(t, one)
}

func texts[Value net.IP | *net.IPNet](values []Value) []string {
	texts := []string{}
	for _, value := range values {
		texts = append(texts, fmt.Sprint(value))
	}
	return texts
}
